"""Every way in which trainers save and clients load ends with the right weights, and with nothing lost."""

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path

import pytest
from deployment_world import CheckedSampler, SimCluster, World, play, weights

from rlorch.errors import DigestMismatchError, ModelError, ReplicaLostError, RlorchError, SelfTestError, UserError
from rlorch.service.types import Deployment
from rlorch.sim.sampler import SimSamplerConfig

Story = Callable[[World], Awaitable[None]]
SLOW = SimSamplerConfig(mean_tokens=2000, spread=0.1)
LONG = {"max_tokens": 4000}


def tell(tmp_path: Path, story: Story, **options: object) -> None:
    async def scenario() -> None:
        async with World(tmp_path, **options) as world:  # type: ignore[arg-type]
            await story(world)

    play(scenario)


async def view(world: World) -> Deployment:
    return await world.deployments.get("d")


def calls(world: World, replica: str = "d.0") -> list[tuple[str, object]]:
    return world.cluster.samplers[replica].weights_calls()


# --- the rows of the syncer's bookkeeping -----------------------------------------------------------------


def test_base_then_deltas_are_committed_in_flight(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        for name, kind in (("s0", "base"), ("s1", "delta"), ("s2", "delta")):
            await job.save(name, kind)
            await world.load(name)
            assert world.serves(job, name)
        assert calls(world) == [
            ("load", [0]), ("load", [1]), ("stage", 2), ("commit", 2), ("stage", 3), ("commit", 3),
        ]  # fmt: skip

    tell(tmp_path, story)


def test_a_first_hot_load_that_failed_is_made_good_by_the_next_delta_announced_as_full(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        await job.save("s0", "base")
        world.cluster.samplers["d.0"].faults["load"] = [DigestMismatchError("bad bytes")]
        with pytest.raises(RlorchError, match=r"s0 failed: d\.0: bad bytes"):
            await world.load("s0")
        await job.save("s1", "delta")
        await world.load("s1", previous=None)
        assert world.serves(job, "s1")
        assert calls(world)[-1] == ("load", [1, 2])

    tell(tmp_path, story)


def test_a_middle_hot_load_that_failed_is_caught_up_with_by_the_next(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        await job.save("s0", "base")
        await world.load("s0")
        await job.save("s1")
        world.cluster.samplers["d.0"].faults["stage"] = [DigestMismatchError("bad bytes")]
        with pytest.raises(RlorchError, match="bad bytes"):
            await world.load("s1", previous="s0")
        assert world.serves(job, "s0")
        await job.save("s2")
        await world.load("s2", previous="s0")  # the client is wrong: s2 was made against s1
        assert world.serves(job, "s2")
        assert calls(world)[-4:] == [("stage", 2), ("commit", 2), ("stage", 3), ("commit", 3)]

    tell(tmp_path, story)


def test_a_first_checkpoint_of_type_delta_is_loaded(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        for name in ("s0", "s1"):
            await job.save(name, "delta")
            await world.load(name, previous=None)
            assert world.serves(job, name)

    tell(tmp_path, story)


def test_an_older_snapshot_can_be_gone_back_to_and_forward_from(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        for name in ("s0", "s1", "s2"):
            await job.save(name)
            await world.load(name)
        for name in ("s1", "s2", "s0"):
            await world.load(name)
            assert world.serves(job, name)
            assert (await view(world)).snapshot_identity == name

    tell(tmp_path, story)


def test_snapshots_that_were_never_loaded_are_walked_through(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        for number in range(6):
            await job.save(f"s{number}")
            if number in (0, 5):
                await world.load(f"s{number}", previous="s0" if number else None)
        assert world.serves(job, "s5")

    tell(tmp_path, story)


def test_a_new_base_in_the_middle_of_a_run_is_committed_in_flight(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        for name, kind in (("s0", "base"), ("s1", "delta"), ("s2", "base"), ("s3", "delta")):
            await job.save(name, kind)
            if name != "s2":
                await world.load(name)
        assert world.serves(job, "s3")
        assert [what for what, _ in calls(world)].count("load") == 2, "the base model and s0 only"

    tell(tmp_path, story)


def test_a_foreign_snapshot_after_a_reattach_is_loaded_although_its_number_is_the_same(tmp_path):
    async def story(world: World) -> None:
        first, second = world.job("job-a", seed=1), world.job("job-b", seed=2)
        await world.ready()
        for name in ("a0", "a1"):
            await first.save(name)
            await world.load(name)
        for name in ("b0", "b1", "b2"):
            await second.save(name)
        with pytest.raises(UserError, match="no checkpoint 'b1'"):
            await world.deployments.hot_load("d", "b1")
        await world.deployments.update("d", {"hot_load_trainer_job": "accounts/x/rlorTrainerJobs/job-b"})
        assert (await view(world)).snapshot_identity == "a1", "a re-attach alone changes no weights"
        for name in ("b1", "b2"):
            await world.load(name, previous="a1")
            assert world.serves(second, name)
        assert (await world.sample("r")).identities == {3: "b2"}

    tell(tmp_path, story)


# --- requests meanwhile -----------------------------------------------------------------------------------


async def sample_across_a_load(world: World, job_name: str = "s1") -> list[object]:
    """Eight long requests, a hot load when they run; what they gave."""
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(world.sample(f"r{i}", **LONG)) for i in range(8)]
        await asyncio.sleep(1.0)
        await world.load(job_name)
        assert not any(task.done() and task.exception() for task in tasks)
    return [task.result() for task in tasks]


def test_async_requests_run_on_over_a_commit_and_name_both_snapshots(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        await job.save("s0")
        await world.load("s0")
        await job.save("s1")
        for sampled in await sample_across_a_load(world):
            assert sampled.identities == {1: "s0", 2: "s1"}
            chain = await world.checkpoints.chain(await world.checkpoints.get("job-a", "s1"))
            assert sampled.digests == {link.version: link.digest for link in chain}

    tell(tmp_path, story, cluster=SimCluster(config=SLOW))


def test_sync_requests_end_before_the_commit(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready(hot_load_transition_type="SYNC")
        await job.save("s0")
        await world.load("s0")
        await job.save("s1")
        for sampled in await sample_across_a_load(world):
            assert sampled.identities == {1: "s0"}
        assert (await world.sample("after")).identities == {2: "s1"}

    config = SimSamplerConfig(mean_tokens=1000, spread=0.1)  # done within the drain
    tell(tmp_path, story, cluster=SimCluster(config=config))


def test_requests_that_do_not_end_within_the_drain_are_sent_again_after_a_whole_load(tmp_path):
    async def story(world: World) -> None:
        first, second = world.job("job-a", seed=1), world.job("job-b", seed=2)
        await world.ready()
        await first.save("a0")
        await second.save("b0")
        await world.load("a0")
        await world.deployments.update("d", {"hot_load_trainer_job": "job-b"})
        for sampled in await sample_across_a_load(world, "b0"):
            assert sampled.identities == {1: "b0"}, "one snapshot of two that share a number"
            assert len(sampled.completions[0].tokens_T) > 1000
        assert [what for what, _ in world.cluster.samplers["d.0"].calls].count("abort") == 8

    config = SimSamplerConfig(mean_tokens=5000, spread=0.1)
    tell(tmp_path, story, cluster=SimCluster(config=config))


def test_a_stale_or_unknown_identity_is_refused_and_the_served_one_named(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        for name in ("s0", "s1"):
            await job.save(name)
            await world.load(name)
        assert (await world.sample("r", identity="s1")).identities == {2: "s1"}
        for identity in ("s0", "s7"):
            with pytest.raises(UserError, match=f"serves s1, not '{identity}'"):
                await world.sample("r", identity=identity)

    tell(tmp_path, story)


def test_an_identity_that_is_being_loaded_is_waited_for(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        await job.save("s0")
        await world.deployments.hot_load("d", "s0")
        assert (await view(world)).state == "UPDATING"
        assert (await world.sample("r", identity="s0")).identities == {1: "s0"}
        assert (await view(world)).state == "READY"

    tell(tmp_path, story)


# --- failures ---------------------------------------------------------------------------------------------


def test_a_failed_hot_load_leaves_the_old_snapshot_serving_and_says_why_until_a_good_one(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        await job.save("s0")
        await world.load("s0")
        await job.save("s1")
        world.cluster.samplers["d.0"].faults["stage"] = [DigestMismatchError("bad bytes")]
        with pytest.raises(RlorchError, match="bad bytes"):
            await world.load("s1")
        (replica,) = (await view(world)).replicas
        assert (replica.stage, replica.target_snapshot_identity, replica.error) == ("error", "s1", "d.0: bad bytes")
        assert (replica.readiness, replica.current_snapshot_identity) == (True, "s0")
        assert (await world.sample("r")).identities == {1: "s0"}
        await world.load("s1")
        (replica,) = (await view(world)).replicas
        assert (replica.stage, replica.current_snapshot_identity, replica.error) == ("ready", "s1", "")

    tell(tmp_path, story)


def test_a_commit_that_does_not_verify_is_followed_by_a_whole_load(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        for name in ("s0", "s1"):
            await job.save(name)
            if name == "s1":
                world.cluster.samplers["d.0"].faults["commit"] = [DigestMismatchError("undone")]
            await world.load(name)
        assert world.serves(job, "s1")
        assert calls(world)[-2:] == [("commit", 2), ("load", [1, 2])]

    tell(tmp_path, story)


def test_a_payload_that_is_damaged_fails_the_load_and_nothing_else(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        await job.save("s0")
        await world.load("s0")
        checkpoint = await job.save("s1")
        payload = world.layout.job("job-a") / "weights" / "payloads" / checkpoint.path
        content = payload.read_bytes()
        payload.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(RlorchError, match="s1 failed"):
            await world.load("s1")
        payload.write_bytes(content[:-1])
        with pytest.raises(RlorchError, match=r"s1 failed: .*damaged"):
            await world.load("s1")
        assert world.serves(job, "s0")
        assert (await world.sample("r")).identities == {1: "s0"}

    tell(tmp_path, story)


def test_a_replica_that_cannot_follow_is_replaced_when_another_can(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready(min_replicas=2, max_replicas=2)
        await world.deployments._entry("d").life.changed.until(
            lambda _: len(world.deployments._entry("d").life.ready()) == 2
        )
        await job.save("s0")
        world.cluster.samplers["d.1"].faults["load"] = [ModelError("odd"), ModelError("odd")]
        await world.load("s0")
        assert (await view(world)).snapshot_identity == "s0"
        await asyncio.sleep(60)
        assert sorted(world.cluster.starts) == ["d.0", "d.1", "d.1"]
        assert world.serves(job, "s0", "d.0")
        assert world.serves(job, "s0", "d.1")
        assert all(replica.readiness for replica in (await view(world)).replicas)

    tell(tmp_path, story)


def test_a_snapshot_that_kills_replicas_is_given_up(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        await job.save("s0")
        await world.load("s0")
        await job.save("s1")

        def poison(sampler: CheckedSampler) -> None:
            sampler.faults["stage"] = [SelfTestError("does not compute")]

            async def load(chain: object, real=sampler.load) -> object:
                if chain[-1].version == 2:
                    raise ReplicaLostError("died of it")
                return await real(chain)

            sampler.load = load  # type: ignore[method-assign]

        poison(world.cluster.samplers["d.0"])
        world.cluster.on_start = poison
        with pytest.raises(RlorchError, match=r"s1 failed: d\.0: died of it"):
            await world.load("s1")
        await asyncio.sleep(60)
        assert (await world.sample("r")).identities == {1: "s0"}

    tell(tmp_path, story)


def test_a_newer_hot_load_takes_over_and_the_older_ones_waiter_is_told(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        for name in ("s0", "s1"):
            await job.save(name)
        await world.deployments.hot_load("d", "s0")
        async with asyncio.TaskGroup() as group:
            waiter = group.create_task(_error(world.deployments.wait_for_snapshot("d", "s0", 100)))
            await asyncio.sleep(0.3)
            await world.deployments.hot_load("d", "s1")
            await world.deployments.wait_for_snapshot("d", "s1", 100)
        assert "hot-load it first" in str(waiter.result())
        assert world.serves(job, "s1")

    tell(tmp_path, story)


async def _error(work: Awaitable[object]) -> Exception | None:
    try:
        await work
    except RlorchError as error:
        return error
    return None


def test_what_cannot_be_loaded_is_refused_at_once(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        await job.save_directory("state-1", "state")
        for identity, said in (("nothing", "no checkpoint"), ("state-1", "training state")):
            with pytest.raises(UserError, match=said):
                await world.deployments.hot_load("d", identity)
        with pytest.raises(UserError, match="does not load 's9'"):
            await world.deployments.wait_for_snapshot("d", "s9", 10)

    tell(tmp_path, story)


# --- adapters and merged models ---------------------------------------------------------------------------


def test_adapters_are_kept_side_by_side_and_the_newest_is_the_default(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready(max_loras=2)
        for name in ("l0", "l1"):
            await job.save_directory(name, "lora")
            await world.load(name)
        sampler = world.cluster.samplers["d.0"]
        assert (await world.sample("r1")).adapter == "l1"
        assert (await world.sample("r2", identity="l0")).adapter == "l0"
        assert (await view(world)).snapshot_identity == "l1"
        await job.save_directory("l2", "lora")
        await world.load("l2")
        await asyncio.sleep(1.0)  # what no request uses is unloaded behind it
        assert sorted(sampler.adapters) == ["job-a.l0", "job-a.l2"], "l1 was used longest ago"
        assert (await view(world)).replicas[0].loaded_adapters == ("l0", "l2")
        with pytest.raises(UserError, match=r"the base model with the adapters l0, l2, not 'l1'"):
            await world.sample("r3", identity="l1")
        assert calls(world) == [("load", [0])], "adapters move no weights"
        assert sorted(path.name for path in (tmp_path / "data/deployments/d/adapters").iterdir()) == [
            "job-a.l0", "job-a.l2",
        ]  # fmt: skip

    tell(tmp_path, story)


def test_an_adapter_puts_the_base_model_back_and_full_weights_drop_the_adapters(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        await job.save("s0")
        await world.load("s0")
        await job.save_directory("l0", "lora")
        await world.load("l0")
        sampled = await world.sample("r1")
        assert (sampled.identities, sampled.adapter) == ({0: ""}, "l0")
        await world.load("s0")
        sampled = await world.sample("r2")
        assert (sampled.identities, sampled.adapter) == ({1: "s0"}, None)
        assert world.cluster.samplers["d.0"].adapters == {}

    tell(tmp_path, story)


def test_a_merged_model_is_loaded_from_its_directory(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        await job.save_directory("m0", "merged_base", seed=11)
        await job.save_directory("m1", "merged_base", seed=12)
        for name, seed in (("m0", 11), ("m1", 12), ("m0", 11)):
            await world.load(name)
            assert (world.cluster.samplers["d.0"].state["embed"] == weights(0, seed)["embed"]).all()
            assert (await world.sample(f"of-{name}")).identities == {0: name}

    tell(tmp_path, story)


# --- files ------------------------------------------------------------------------------------------------


def test_only_payloads_that_a_replica_may_still_need_are_kept(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        for name, kind in (("s0", "base"), ("s1", "delta"), ("s2", "base"), ("s3", "delta")):
            await job.save(name, kind)
            await world.load(name)
        chain = await world.checkpoints.chain(await world.checkpoints.get("job-a", "s3"))
        payloads = tmp_path / "data/deployments/d/weights/payloads"
        assert sorted(path.name for path in payloads.iterdir()) == sorted(link.payload for link in chain)
        source = world.layout.job("job-a") / "weights" / "payloads" / chain[0].payload
        assert (payloads / chain[0].payload).stat().st_ino == source.stat().st_ino, "linked, not copied"

    tell(tmp_path, story)


def test_a_replica_that_comes_late_gets_the_snapshot_after_its_job_and_files_are_gone(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        for name in ("s0", "s1"):
            await job.save(name)
        await world.load("s1")
        for path in (world.layout.job("job-a") / "weights" / "payloads").iterdir():
            path.unlink()
        await world.deployments.update("d", {"min_replicas": 2, "max_replicas": 2})
        await asyncio.sleep(60)
        assert world.serves(job, "s1", "d.1")
        assert calls(world, "d.1") == [("load", [1, 2])]

    tell(tmp_path, story)


def test_what_is_served_is_protected_from_deletion(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready()
        for name in ("s0", "s1"):
            await job.save(name, "base")
        await world.load("s0")
        with pytest.raises(UserError, match="in use"):
            await world.checkpoints.delete("job-a", "s0")

    tell(tmp_path, story)
