"""A rate limit: with `Settings(starts_per_second=2)` two attempts start in any second.

Each task type has that limit for itself. A task that has to wait for it holds no slot,
and keeps nobody of another type waiting. By default there is no limit.
"""

import pytest

pytestmark = pytest.mark.anyio


def starts(service, name):
    """When the tasks of this name were started."""
    return [time for started, time in service.started if started == name]


@pytest.mark.parametrize("rate", [1, 2, 5])
async def test_no_more_than_so_many_start_in_any_second(serve, clock, rate):
    async with serve(max_workers=20, starts_per_second=rate) as service:
        for _ in range(20):
            await service.submit()
        await clock.sleep(100)
        times = starts(service, "it")
        assert len(times) == 20, "in the end each task should be started"
        for first, beyond in zip(times, times[rate:], strict=False):
            assert beyond - first > 0.99, f"more than {rate} in one second: {times}"
        assert times[-1] < 20 / rate + 0.1, f"it should not take so long: {times}"


async def test_each_type_has_a_limit_of_its_own(serve, clock):
    async with serve(max_workers=10, starts_per_second=1) as service:
        for _ in range(5):
            await service.submit("email", task_type="send_email")
            await service.submit("image", task_type="resize_image")
        await clock.sleep(4.9)
        assert len(starts(service, "email")) == 5
        assert len(starts(service, "image")) == 5


async def test_a_task_that_waits_for_its_turn_holds_no_slot(serve, clock):
    async with serve(max_workers=1, starts_per_second=1) as service:
        for _ in range(3):
            await service.submit("email", priority=1)
        await service.submit("image", priority=10, task_type="resize_image")
        await clock.sleep(0.5)
        assert service.names == ["email", "image"], "the only slot is free"


async def test_while_it_waits_it_can_be_overtaken_and_cancelled(serve, clock):
    async with serve(starts_per_second=1) as service:
        for name in ("first", "second", "third"):
            await service.submit(name, priority=10)
        cancelled = await service.submit("cancelled", priority=10)
        await service.submit("urgent", priority=1)
        answer = await service.client.delete(f"/tasks/{cancelled}")
        assert answer.status_code == 200, "it waits, so it can be cancelled"
        await clock.sleep(10)
        assert service.names == ["first", "urgent", "second", "third"]


async def test_a_rest_is_not_saved_up(serve, clock):
    async with serve(max_workers=10, starts_per_second=2) as service:
        await service.submit()
        await clock.sleep(3600)
        for _ in range(10):
            await service.submit()
        await clock.sleep(0.9)
        assert len(service.started) <= 1 + 2, "two in a second, also after an hour"


async def test_a_retry_is_a_start_too(serve, clock):
    async with serve(starts_per_second=1, backoff_base=0) as service:
        await service.submit(fails=3, max_retries=3)
        await clock.sleep(2.9)
        assert len(service.started) == 3


async def test_without_the_setting_there_is_no_limit(serve, clock):
    async with serve(max_workers=200) as service:
        began = clock.now()
        for _ in range(100):
            await service.client.post("/tasks", json={"task_type": "send_email"})
        await clock.settle()
        assert len(service.started) == 100
        assert clock.now() - began < 0.1, "by default each task starts at once"


@pytest.mark.parametrize("rate", [0, -1])
async def test_a_setting_that_makes_no_sense_is_refused(serve, rate):
    with pytest.raises(ValueError, match="starts_per_second"):
        async with serve(starts_per_second=rate):
            pass
