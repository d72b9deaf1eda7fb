"""The commands of `soppu`, one file each; soppu.cli puts them together."""
