"""A rate limit per task type: with `Settings(starts_per_second=2)` at most two attempts of a type start in any second.

A task that has to wait for that holds no slot and keeps nobody of another type waiting. By default there is no limit.
"""

import pytest

pytestmark = pytest.mark.anyio
EMAIL, IMAGE = {"task_type": "send_email"}, {"task_type": "resize_image"}


def starts(service, name):
    return [time for started, time in service.started if started == name]


@pytest.mark.parametrize("rate", [1, 2, 5])
async def test_no_more_than_so_many_start_in_any_second(serve, clock, rate):
    async with serve(max_workers=20, starts_per_second=rate) as service:
        for _ in range(20):
            await service.submit()
        await clock.sleep(100)
        times = starts(service, "it")
        assert len(times) == 20, "in the end every task should be started"
        for first, beyond in zip(times, times[rate:], strict=False):
            assert beyond - first > 0.99, f"within one second more than {rate} were started; the times: {times}"
        assert times[-1] < 20 / rate + 0.1, f"at {rate} a second, 20 tasks should not take so long: {times}"


async def test_each_type_has_a_limit_of_its_own(serve, clock):
    async with serve(max_workers=10, starts_per_second=1) as service:
        for _ in range(5):
            await service.submit("email", **EMAIL)
            await service.submit("image", **IMAGE)
        await clock.sleep(4.9)
        for name in ("email", "image"):
            assert len(starts(service, name)) == 5, f"the other type should not slow this one down: {service.started}"


async def test_a_task_that_waits_for_its_turn_holds_no_slot(serve, clock):
    async with serve(max_workers=1, starts_per_second=1) as service:
        for _ in range(3):
            await service.submit("email", priority=1, **EMAIL)
        await service.submit("image", priority=10, **IMAGE)
        await clock.sleep(0.5)
        assert service.names == ["email", "image"], "the only slot is free: the image should not wait for e-mails"


async def test_while_it_waits_it_can_be_overtaken_and_cancelled(serve, clock):
    async with serve(starts_per_second=1) as service:
        for name in ("first", "second", "third"):
            await service.submit(name, priority=10)
        cancelled = await service.submit("cancelled", priority=10)
        await service.submit("urgent", priority=1)
        answer = await service.client.delete(f"/tasks/{cancelled}")
        assert answer.status_code == 200, "it waits, so it can be cancelled"
        await clock.sleep(10)
        assert service.names == ["first", "urgent", "second", "third"], (
            "among those that wait for their turn, the best should come first, then who came first")


async def test_a_rest_is_not_saved_up_without_bound(serve, clock):
    async with serve(max_workers=10, starts_per_second=2) as service:
        await service.submit()
        await clock.sleep(3600)
        for _ in range(10):
            await service.submit()
        await clock.sleep(0.9)
        assert len(service.started) <= 1 + 2, "after an hour of rest no more than two should start in one second either"


async def test_a_retry_is_a_start_too(serve, clock):
    async with serve(starts_per_second=1, backoff_base=0) as service:
        await service.submit(fails=3, max_retries=3)
        await clock.sleep(2.9)
        assert len(service.started) == 3, f"with one start a second: {service.started}"


async def test_without_the_setting_there_is_no_limit(serve, clock):
    async with serve(max_workers=200) as service:
        began = clock.now()
        for _ in range(100):
            await service.client.post("/tasks", json=EMAIL)
        await clock.settle()
        assert len(service.started) == 100, "by default every task should start at once"
        assert clock.now() - began < 0.1


async def test_a_setting_that_makes_no_sense_is_refused(serve):
    for rate in (0, -1):
        with pytest.raises(ValueError, match="starts_per_second"):
            async with serve(starts_per_second=rate):
                pass
