"""Ageing: a task that waits gets better, so that a LOW one does not wait for ever.

`Settings(ageing_seconds=10)`: ten seconds of waiting make up for one step of priority.
A LOW (10) that has waited for more than 90 s comes before a HIGH (1) that is new.
Without the setting nothing ages.
"""

import math

import pytest

pytestmark = pytest.mark.anyio


async def order_of(serve, *tasks, **settings):
    """Submit each (seconds, priority) at its time, while the only worker is busy.

    Return the priorities in the order of their start.
    """
    async with serve(max_workers=1, **settings) as service:
        await service.submit("busy", seconds=1000)
        began = service.clock.now()
        for seconds, priority in tasks:
            await service.clock.sleep(began + seconds - service.clock.now())
            await service.submit(priority, priority=priority)
        await service.clock.sleep(1000)
        return service.names[1:]


@pytest.mark.parametrize(("wait", "expected"), [(50, [1, 10]), (120, [10, 1])])
async def test_low_overtakes_high_once_it_has_waited_enough(serve, wait, expected):
    order = await order_of(serve, (0, 10), (wait, 1), ageing_seconds=10)
    assert order == expected, f"nine steps are 90 s; the LOW came {wait} s earlier"


@pytest.mark.parametrize(("wait", "expected"), [(30, [5, 10]), (70, [10, 5])])
async def test_a_step_of_priority_counts_the_same_everywhere(serve, wait, expected):
    order = await order_of(serve, (0, 10), (wait, 5), ageing_seconds=10)
    assert order == expected, f"five steps are 50 s; the LOW came {wait} s earlier"


async def test_the_later_task_ages_too(serve):
    order = await order_of(serve, (0, 10), (50, 1), (600, 1), ageing_seconds=10)
    assert order == [1, 10, 1], "the HIGH of second 50 ages as the LOW does"


async def test_within_one_priority_the_order_of_submission_stays(serve):
    async with serve(max_workers=1, ageing_seconds=0.5) as service:
        await service.submit("busy", seconds=100)
        names = [f"{number:02}" for number in range(20)]
        for name in names:
            await service.submit(name)
        await service.clock.sleep(200)
        assert service.names[1:] == names


@pytest.mark.parametrize(
    ("hours", "wait", "expected"),
    [(1, 50, ["high", "low"]), (-1, 120, ["low", "high"])],
)
async def test_somebody_sets_the_wall_clock(serve, hours, wait, expected):
    async with serve(max_workers=1, ageing_seconds=10) as service:
        await service.submit("busy", seconds=200)
        await service.submit("low", priority=10)
        service.clock.wall_clock_is_ahead = 3600 * hours
        await service.clock.sleep(wait)
        await service.submit("high", priority=1)
        await service.clock.sleep(300)
        assert service.names[1:] == expected, "nobody has waited longer for that"


async def test_without_the_setting_nothing_ages(serve):
    tasks = [(0, 10), (900, 1)]
    assert await order_of(serve, *tasks, ageing_seconds=math.inf) == [1, 10]
    assert await order_of(serve, *tasks) == [1, 10]


@pytest.mark.parametrize("seconds", [0, -1])
async def test_a_setting_that_makes_no_sense_is_refused(serve, seconds):
    with pytest.raises(ValueError, match="ageing_seconds"):
        async with serve(ageing_seconds=seconds):
            pass
