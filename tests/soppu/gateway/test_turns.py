"""The queue: fair by user in work, bounded, and nothing is lost of it whoever gives up when."""

from __future__ import annotations

import asyncio
import random

import pytest

from soppu.gateway.refusals import Refused
from soppu.gateway.settings import Limits
from soppu.gateway.turns import Turns


def limits(**values: float) -> Limits:
    return Limits(**{"in_flight": 1, "waiting": 100, "each_user": 100, **values})  # type: ignore[arg-type]


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


@pytest.mark.parametrize("seed", range(5))
def test_users_who_wait_all_the_time_get_equal_work(seed: int) -> None:
    """Whatever the sizes of their requests: never further apart than one request of each."""
    draw, order = random.Random(seed), []
    sizes = {"a": [draw.randint(1, 10) for _ in range(400)], "b": [draw.randint(20, 60) for _ in range(60)]}

    async def main() -> None:
        turns = Turns(limits(waiting=1000, each_user=1000))

        async def ask(user: str, work: int) -> None:
            async with turns.turn(user, work):
                order.append((user, work))
                await asyncio.sleep(0)

        async with turns.turn("first", 1):
            tasks = [asyncio.create_task(ask(user, work)) for user in sizes for work in sizes[user]]
            await settle()
        await asyncio.gather(*tasks)
        assert turns.in_flight == 0 and turns.waiting == 0

    asyncio.run(main())
    done = {"a": 0, "b": 0}
    left = {user: len(each) for user, each in sizes.items()}
    for user, work in order:
        if not all(left.values()):
            break
        assert abs(done["a"] - done["b"]) <= 10 + 60
        done[user] += work
        left[user] -= 1


def test_one_who_comes_seldom_does_not_wait_for_one_who_has_many() -> None:
    order: list[str] = []

    async def main() -> None:
        turns = Turns(limits())

        async def ask(user: str) -> None:
            async with turns.turn(user, 100):
                order.append(user)
                await asyncio.sleep(0)

        tasks = [asyncio.create_task(ask("greedy")) for _ in range(20)]
        await settle()
        tasks.append(asyncio.create_task(ask("modest")))
        await asyncio.gather(*tasks)

    asyncio.run(main())
    assert order.index("modest") <= 6  # those begun before it came, and one more


def test_a_full_queue_refuses_who_has_most_in_it() -> None:
    async def main() -> None:
        turns = Turns(limits(waiting=3))

        async def ask(user: str) -> str:
            try:
                async with turns.turn(user, 1):
                    await asyncio.sleep(0)
                    return "answered"
            except Refused as refused:
                return f"{refused.status} {refused.after and refused.after > 0}"

        async with turns.turn("first", 1):
            greedy = [asyncio.create_task(ask("greedy")) for _ in range(4)]
            await settle()
            assert turns.waiting == 3 and greedy[3].done()  # nobody has less than who came
            modest = asyncio.create_task(ask("modest"))
            await settle()
            assert turns.waiting == 3 and greedy[2].done()
        answers = await asyncio.gather(*greedy, modest)
        assert answers == ["answered", "answered", "429 True", "429 True", "answered"]
        assert turns.in_flight == 0 and turns.waiting == 0

    asyncio.run(main())


def test_who_waits_too_long_is_told_and_who_gives_up_is_forgotten() -> None:
    async def main() -> None:
        turns = Turns(limits(waiting_s=0.05))

        async def ask() -> None:
            async with turns.turn("alice", 1):
                pass

        async with turns.turn("bob", 1):
            with pytest.raises(Refused) as refused:
                await ask()
            assert refused.value.status == 429
            waits = asyncio.create_task(ask())
            await settle()
            waits.cancel()
            await asyncio.gather(waits, return_exceptions=True)
            assert turns.waiting == 0 and turns.in_flight == 1
        await ask()

    asyncio.run(main())


def test_a_turn_given_to_one_who_gives_up_at_that_moment_goes_on() -> None:
    async def main() -> None:
        turns = Turns(limits())
        began: list[str] = []

        async def ask(user: str) -> None:
            async with turns.turn(user, 1):
                began.append(user)

        holder = turns.turn("first", 1)
        await holder.__aenter__()
        one, two = asyncio.create_task(ask("one")), asyncio.create_task(ask("two"))
        await settle()
        await holder.__aexit__(None, None, None)  # gives the turn to `one`, who has not run since
        one.cancel()
        await asyncio.gather(one, two, return_exceptions=True)
        assert began == ["two"] and turns.in_flight == 0 and turns.waiting == 0

    asyncio.run(main())


@pytest.mark.parametrize("seed", range(3))
def test_nothing_is_lost_whoever_comes_fails_or_gives_up(seed: int) -> None:
    draw, most = random.Random(seed), [0, 0]

    async def main() -> None:
        turns = Turns(limits(in_flight=3, waiting=6, waiting_s=0.02))

        async def ask(user: str) -> None:
            async with turns.turn(user, draw.randint(1, 50)):
                most[0], most[1] = max(most[0], turns.in_flight), max(most[1], turns.waiting)
                await asyncio.sleep(draw.random() * 0.01)
                if draw.random() < 0.2:
                    raise ValueError("a fault")

        tasks = []
        for _ in range(60):
            tasks.append(asyncio.create_task(ask(draw.choice("abcde"))))
            if draw.random() < 0.3:
                draw.choice(tasks).cancel()
            await asyncio.sleep(draw.random() * 0.002)
        ended = await asyncio.gather(*tasks, return_exceptions=True)
        kinds = (Refused, ValueError, asyncio.CancelledError, type(None))
        assert all(isinstance(one, kinds) for one in ended)
        assert turns.in_flight == 0 and turns.waiting == 0 and not turns._queue and not turns._done

    asyncio.run(main())
    assert most[0] == 3 and most[1] <= 6


def test_a_user_has_a_bounded_number_of_requests_at_once() -> None:
    turns = Turns(limits(each_user=2))
    with turns.present("alice"), turns.present("alice"):
        with pytest.raises(Refused), turns.present("alice"):
            pass
        with turns.present("bob"):
            pass
    with turns.present("alice"):
        pass
