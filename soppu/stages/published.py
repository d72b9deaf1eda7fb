"""What became of publications: the rows that the stage leaves in a run's folder, and the report reads."""

from __future__ import annotations

from dataclasses import dataclass

from soppu.stages.run import open_run

# What a report says of a serving target.
TOLD = ("target", "url", "bundle_id", "canaries", "prompt", "completions", "asked_as")


@dataclass(frozen=True)
class Published:
    """What became of one publication. `error` is "" where the bundle is live."""

    name: str
    target: str
    form: str  # "adapters" or "bundle"
    url: str
    bundle_id: str
    users: int = 0
    push_s: float = 0.0  # until the bundle was staged
    canaries_s: float = 0.0
    error: str = ""


def target_names(run_folder: str) -> list[str]:
    """The names of a run's serving targets, in the order of its configuration."""
    return [settings.label for settings in open_run(run_folder).config.serve.each()]


def stage_name(target: str) -> str:
    """What the publication to one target is called among the stages of a run."""
    return f"publish {target}"


def serving_file(name: str) -> str:
    """The file of a run folder that tells what one target serves."""
    return f"serving/{name}.json"
