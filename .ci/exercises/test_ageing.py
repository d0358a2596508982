"""Priority ageing: a task that waits gets better, so that a LOW one is not overtaken for ever.

`Settings(ageing_seconds=10)`: ten seconds of waiting make up for one step of priority. A LOW (10) that has waited for
more than 90 s comes before a HIGH (1) that is new. Without the setting nothing ages.
"""

import math

import pytest

pytestmark = pytest.mark.anyio


async def order_of(serve, clock, *tasks, **knobs):
    """Submit (seconds, priority) in turn, while the only worker is busy; return the priorities as they were started."""
    async with serve(max_workers=1, **knobs) as service:
        await service.submit("busy", seconds=1000)
        began = clock.now()
        for seconds, priority in tasks:
            await clock.sleep(began + seconds - clock.now())
            await service.submit(priority, priority=priority)
        await clock.sleep(1000)
        return service.names[1:]


@pytest.mark.parametrize(("wait", "expected"), [(50, [1, 10]), (120, [10, 1])])
async def test_a_low_task_overtakes_a_high_one_once_it_has_waited_long_enough(serve, clock, wait, expected):
    order = await order_of(serve, clock, (0, 10), (wait, 1), ageing_seconds=10)
    assert order == expected, f"nine steps lie between LOW and HIGH: 90 s; the LOW had waited {wait} s longer"


@pytest.mark.parametrize(("wait", "expected"), [(30, [5, 10]), (70, [10, 5])])
async def test_a_step_of_priority_counts_the_same_everywhere(serve, clock, wait, expected):
    order = await order_of(serve, clock, (0, 10), (wait, 5), ageing_seconds=10)
    assert order == expected, f"five steps lie between LOW and MEDIUM: 50 s; the LOW had waited {wait} s longer"


async def test_the_later_task_ages_too(serve, clock):
    order = await order_of(serve, clock, (0, 10), (50, 1), (600, 1), ageing_seconds=10)
    assert order == [1, 10, 1], "by 600 s the LOW has aged, but so has the HIGH that came at 50 s: it stays in front"


async def test_within_one_priority_the_order_of_submission_stays(serve):
    async with serve(max_workers=1, ageing_seconds=0.5) as service:
        await service.submit("busy", seconds=100)
        names = [f"{number:02}" for number in range(20)]
        for name in names:
            await service.submit(name)
        await service.clock.sleep(200)
        assert service.names[1:] == names


@pytest.mark.parametrize("hours", [-1, 1])
async def test_it_does_not_depend_on_the_wall_clock(serve, clock, hours):
    async with serve(max_workers=1, ageing_seconds=10) as service:
        await service.submit("busy", seconds=200)
        await service.submit("low", priority=10)
        clock.wall_clock_is_ahead = 3600 * hours
        await clock.sleep(50 if hours > 0 else 120)
        await service.submit("high", priority=1)
        await clock.sleep(300)
        expected = ["high", "low"] if hours > 0 else ["low", "high"]
        assert service.names[1:] == expected, (
            f"somebody has set the wall clock by {hours} h, and nobody has waited longer for that: "
            "measure with the clock of the event loop, which only ever goes forward")


async def test_without_the_setting_nothing_ages(serve, clock):
    order = await order_of(serve, clock, (0, 10), (900, 1), ageing_seconds=math.inf)
    assert order == [1, 10], "an infinite time for one step means that nothing ages"
    order = await order_of(serve, clock, (0, 10), (900, 1))
    assert order == [1, 10], "by default nothing should age"


async def test_a_setting_that_makes_no_sense_is_refused(serve):
    for seconds in (0, -1):
        with pytest.raises(ValueError, match="ageing_seconds"):
            async with serve(ageing_seconds=seconds):
                pass
