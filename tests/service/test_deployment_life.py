"""Deployments come, serve, scale, lose replicas, outlive their service, and go."""

import asyncio
from dataclasses import replace

import numpy as np
import pytest
from deployment_world import PROMPT_T, SETTINGS, START_S, SimCluster, World, play

from rlorch.errors import AbortedError, DeadlineError, ModelError, ReplicaLostError, UserError
from rlorch.service.deployments import DEPLOYMENTS
from rlorch.service.types import DeploymentConfig
from rlorch.sim.queueing import EngineModel
from rlorch.sim.sampler import SimSamplerConfig

LONG = SimSamplerConfig(mean_tokens=5000, spread=0.05)
LONG_PARAMS = {"max_tokens": 8000}


def tell(tmp_path, story, **options) -> None:
    async def scenario() -> None:
        async with World(tmp_path, **options) as world:
            await story(world)

    play(scenario)


def now() -> float:
    return asyncio.get_running_loop().time()


# --- creation ---------------------------------------------------------------------------------------------


def test_a_deployment_with_a_minimum_of_zero_starts_a_replica_all_the_same(tmp_path):
    async def story(world: World) -> None:
        created = await world.deployments.create(DeploymentConfig("d", "base"))
        assert created.state == "CREATING"
        ready = await world.deployments.wait("d", 100)
        assert (ready.state, ready.snapshot_identity, len(ready.replicas)) == ("READY", None, 1)
        assert (ready.replicas[0].stage, ready.replicas[0].readiness) == ("ready", True)
        sampled = await world.sample("r")
        assert (sampled.identities, sampled.replica, sampled.adapter) == ({0: ""}, "d.0", None)
        assert sampled.latency_s > sampled.queue_s >= 0

    tell(tmp_path, story)


def test_creating_it_again_gives_the_one_that_is_there_unchanged(tmp_path):
    async def story(world: World) -> None:
        await world.ready()
        again = await world.deployments.create(DeploymentConfig("d", "base", max_replicas=7, description="other"))
        assert (again.config.max_replicas, again.config.description) == (1, "")
        assert len(world.cluster.starts) == 1

    tell(tmp_path, story)


def test_the_base_model_is_anchored_by_the_cluster_and_scored_under(tmp_path):
    async def story(world: World) -> None:
        await world.ready()
        assert world.cluster.anchors == [str(world.model_dir)]
        assert (await world.deployments.score("d", PROMPT_T)).shape == (len(PROMPT_T) - 1,)

    tell(tmp_path, story)


def test_a_model_that_does_not_load_fails_the_deployment_with_the_reason(tmp_path):
    async def story(world: World) -> None:
        world.cluster.start_faults = [ModelError("no such architecture")]
        await world.deployments.create(DeploymentConfig("d", "base"))
        failing = asyncio.ensure_future(world.sample("r"))
        failed = await world.deployments.wait("d", 100)
        assert (failed.state, failed.message) == ("FAILED", "no such architecture")
        with pytest.raises(ModelError, match="d failed: no such architecture"):
            await failing
        with pytest.raises(UserError, match="is FAILED"):
            await world.sample("r2")
        created = await world.deployments.create(DeploymentConfig("d", "base", description="again"))
        assert created.config.description == "again"
        assert (await world.deployments.wait("d", 100)).state == "READY"

    tell(tmp_path, story)


def test_a_replica_that_never_starts_fails_it_after_some_tries(tmp_path):
    async def story(world: World) -> None:
        world.cluster.start_faults = [ReplicaLostError(f"died {i}") for i in range(9)]
        await world.deployments.create(DeploymentConfig("d", "base"))
        failed = await world.deployments.wait("d", 2000)
        assert (failed.state, failed.message) == ("FAILED", "died 5")
        assert len(world.cluster.start_faults) == 3

    tell(tmp_path, story)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (DeploymentConfig("../d", "base"), "cannot be the id of a deployment"),
        (DeploymentConfig("d", "nothing"), "neither a directory nor a known model"),
        (DeploymentConfig("d", "base", min_replicas=3, max_replicas=2), "min_replicas 3 and max_replicas 2"),
        (DeploymentConfig("d", "base", hot_load_transition_type="LATER"), "must be ASYNC or SYNC"),
        (DeploymentConfig("d", "base", hot_load_trainer_job="a/b"), "is not a job"),
    ],
)
def test_bad_settings_are_refused_by_name(tmp_path, config, said):
    async def story(world: World) -> None:
        with pytest.raises(UserError, match=said):
            await world.deployments.create(config)
        assert await world.deployments.list() == ()

    tell(tmp_path, story)


# --- changes ----------------------------------------------------------------------------------------------


def test_only_what_can_be_changed_is_changed(tmp_path):
    async def story(world: World) -> None:
        await world.ready()
        changed = await world.deployments.update(
            "d", {"max_replicas": 3, "hot_load_trainer_job": "job-b", "hot_load_transition_type": "SYNC"}
        )
        assert (changed.config.max_replicas, changed.config.hot_load_transition_type) == (3, "SYNC")
        assert (await world.deployments.get("d")).config.hot_load_trainer_job == "job-b"
        with pytest.raises(UserError, match="'base_model' of deployment d cannot be changed"):
            await world.deployments.update("d", {"base_model": "other"})
        with pytest.raises(UserError, match="no deployment 'e'; there are: d"):
            await world.deployments.update("e", {})

    tell(tmp_path, story)


def test_a_deleted_deployment_leaves_no_replica_no_files_and_ends_its_requests(tmp_path):
    async def story(world: World) -> None:
        await world.ready()
        running = asyncio.ensure_future(world.sample("r", **LONG_PARAMS))
        await asyncio.sleep(1)
        await world.deployments.delete("d")
        with pytest.raises(UserError, match="was deleted"):
            await running
        assert (await world.deployments.get("d")).state == "DELETED"
        assert await world.deployments.list() == ()
        assert world.cluster.samplers == {}
        assert not (tmp_path / "data/deployments/d").exists()
        await world.deployments.delete("d")
        assert (await world.deployments.create(DeploymentConfig("d", "base"))).state == "CREATING"

    tell(tmp_path, story, cluster=SimCluster(config=LONG))


# --- requests ---------------------------------------------------------------------------------------------


def test_an_aborted_request_ends_at_once_in_the_engine_too(tmp_path):
    async def story(world: World) -> None:
        await world.ready()
        running = asyncio.ensure_future(world.sample("r", **LONG_PARAMS))
        await asyncio.sleep(1)
        assert world.cluster.samplers["d.0"].sim.held == ("r",)
        await world.deployments.abort("d", "r")
        await world.deployments.abort("d", "unknown")
        with pytest.raises(AbortedError):
            await running
        assert world.cluster.samplers["d.0"].sim.held == ()

    tell(tmp_path, story, cluster=SimCluster(config=LONG))


def test_a_request_id_is_unique_among_those_alive(tmp_path):
    async def story(world: World) -> None:
        await world.ready()
        async with asyncio.TaskGroup() as group:
            group.create_task(world.sample("r"))
            await asyncio.sleep(0)
            with pytest.raises(UserError, match="alive already"):
                await world.sample("r")
        await world.sample("r")

    tell(tmp_path, story)


def test_a_request_that_takes_too_long_says_so(tmp_path):
    async def story(world: World) -> None:
        await world.ready()
        with pytest.raises(DeadlineError, match="r was not answered within 3 s"):
            await world.sample("r", **LONG_PARAMS)
        assert world.cluster.samplers["d.0"].sim.held == ()

    tell(tmp_path, story, cluster=SimCluster(config=LONG), settings=replace(SETTINGS, request_timeout_s=3.0))


# --- scaling ----------------------------------------------------------------------------------------------


def test_a_deployment_at_zero_wakes_for_a_request_and_serves_its_snapshot(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready(idle_timeout_s=60.0)
        for name in ("s0", "s1"):
            await job.save(name)
            await world.load(name)
        await asyncio.sleep(100)
        assert world.cluster.samplers == {}
        idle = await world.deployments.get("d")
        assert (idle.state, idle.snapshot_identity, idle.replicas) == ("READY", "s1", ())
        began = now()
        assert (await world.sample("r", identity="s1")).identities == {2: "s1"}
        assert START_S <= now() - began < START_S + 10

    tell(tmp_path, story)


def test_scaled_to_zero_by_hand_it_wakes_for_a_hot_load(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready(min_replicas=1)
        await world.deployments.scale_to_zero("d")
        await asyncio.sleep(20)
        assert world.cluster.samplers == {}
        assert (await world.deployments.get("d")).config.min_replicas == 0
        await job.save("s0")
        await world.load("s0")
        assert world.serves(job, "s0")

    tell(tmp_path, story)


def test_a_wait_for_a_replica_that_does_not_come_is_bounded(tmp_path):
    async def story(world: World) -> None:
        await world.ready()
        await world.deployments.scale_to_zero("d")
        await asyncio.sleep(20)
        world.cluster.start_faults = [ReplicaLostError("slow") for _ in range(99)]
        began = now()
        with pytest.raises(DeadlineError, match="no slot in time"):
            await world.sample("r")
        assert now() - began < 100

    tell(tmp_path, story, settings=replace(SETTINGS, wake_timeout_s=50.0))


def test_replicas_come_when_requests_wait_and_go_when_they_are_idle(tmp_path):
    async def story(world: World) -> None:
        await world.ready(max_replicas=3, max_num_seqs=2)
        async with asyncio.TaskGroup() as group:
            for i in range(12):
                group.create_task(world.sample(f"r{i}", **LONG_PARAMS))
            await asyncio.sleep(60)
            assert sorted(world.cluster.samplers) == ["d.0", "d.1", "d.2"]
        await asyncio.sleep(600)
        assert sorted(world.cluster.samplers) == ["d.0"]
        assert world.cluster.stops == ["d.2", "d.1"]

    config = SimSamplerConfig(engine=EngineModel(max_num_seqs=2), mean_tokens=3000, spread=0.05)
    tell(tmp_path, story, cluster=SimCluster(config=config))


def test_a_replica_without_room_is_given_up_and_the_others_go_on(tmp_path):
    async def story(world: World) -> None:
        await world.ready(min_replicas=2, max_replicas=2)
        await asyncio.sleep(60)
        assert len(world.cluster.samplers) == 1
        assert (await world.deployments.get("d")).state == "READY"
        await world.deployments.update("d", {"min_replicas": 1})
        await world.sample("r")
        world.cluster.room = 2
        await world.deployments.update("d", {"min_replicas": 2})
        await asyncio.sleep(60)
        assert sorted(world.cluster.samplers) == ["d.0", "d.1"]

    tell(tmp_path, story, cluster=SimCluster(room=1))


# --- death ------------------------------------------------------------------------------------------------


def test_requests_of_a_replica_that_dies_move_to_the_others_and_it_comes_back_at_the_snapshot(tmp_path):
    async def story(world: World) -> None:
        job = world.job()
        await world.ready(min_replicas=2, max_replicas=2)
        await asyncio.sleep(30)
        for name in ("s0", "s1"):
            await job.save(name)
            await world.load(name)
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(world.sample(f"r{i}", **LONG_PARAMS)) for i in range(6)]
            await asyncio.sleep(1)
            victim = world.cluster.samplers.pop("d.1")
            assert victim.sim.held
            victim.sim.crash()
        assert {task.result().replica for task in tasks} == {"d.0"}
        assert {identity for task in tasks for identity in task.result().identities.values()} == {"s1"}
        await asyncio.sleep(60)
        assert world.serves(job, "s1", "d.1")

    tell(tmp_path, story, cluster=SimCluster(config=SimSamplerConfig(mean_tokens=2000, spread=0.05)))


def test_the_requests_of_the_only_replica_wait_for_its_restart(tmp_path):
    async def story(world: World) -> None:
        await world.ready()
        async with asyncio.TaskGroup() as group:
            task = group.create_task(world.sample("r", **LONG_PARAMS))
            await asyncio.sleep(1)
            world.cluster.samplers.pop("d.0").sim.crash()
        assert task.result().replica == "d.0"
        assert world.cluster.starts == ["d.0", "d.0"]

    tell(tmp_path, story, cluster=SimCluster(config=SimSamplerConfig(mean_tokens=2000, spread=0.05)))


def test_a_replica_that_hangs_is_replaced(tmp_path):
    async def story(world: World) -> None:
        await world.ready()
        sampler = world.cluster.samplers["d.0"]
        async with asyncio.TaskGroup() as group:
            task = group.create_task(world.sample("r", **LONG_PARAMS))
            await asyncio.sleep(1)
            sampler.sim._stop()  # its engine makes no more steps
            sampler.sim._paused += 1
        assert task.result().replica == "d.0"
        assert world.cluster.samplers["d.0"] is not sampler

    tell(tmp_path, story, cluster=SimCluster(config=SimSamplerConfig(mean_tokens=2000, spread=0.05)))


# --- restart of the service -------------------------------------------------------------------------------


def test_a_service_that_comes_back_finds_its_replicas_snapshot_and_adapters(tmp_path):
    async def scenario() -> None:
        cluster = SimCluster()
        async with World(tmp_path, cluster) as world:
            job = world.job()
            await world.ready()
            await job.save("s0")
            await world.load("s0")
            for name in ("l0", "l1"):
                await job.save_directory(name, "lora")
                await world.load(name)
            await world.sample("r1", identity="l0")
            process = cluster.samplers["d.0"]
        assert cluster.samplers == {"d.0": process}, "replicas outlive the service"
        async with World(tmp_path, cluster) as world:
            sampled = await world.sample("r2")
            assert (sampled.identities, sampled.adapter) == ({0: ""}, "l1")
            assert (await world.sample("r3", identity="l0")).adapter == "l0"
            assert cluster.samplers["d.0"] is process
            await world.load("s0")
        cluster.samplers.clear()  # the machine was restarted
        async with World(tmp_path, cluster) as world:
            assert (await world.sample("r4")).identities == {1: "s0"}
            assert cluster.starts == ["d.0", "d.0"]

    play(scenario)


def test_a_hot_load_that_a_service_died_in_is_finished_by_the_next(tmp_path):
    async def scenario() -> None:
        cluster = SimCluster()
        async with World(tmp_path, cluster) as world:
            job = world.job()
            await world.ready()
            for name in ("s0", "s1"):
                await job.save(name)
            await world.load("s0")
            await world.deployments.hot_load("d", "s1")
        async with World(tmp_path, cluster) as world:
            await world.deployments.wait_for_snapshot("d", "s1", 100)
            assert (await world.sample("r")).identities == {2: "s1"}

    play(scenario)


def test_a_deployment_at_zero_comes_back_at_zero_and_stray_replicas_are_stopped(tmp_path):
    async def scenario() -> None:
        cluster = SimCluster()
        async with World(tmp_path, cluster) as world:
            await world.ready(max_replicas=3)
            await world.deployments.scale_to_zero("d")
            await asyncio.sleep(20)
            spec = SETTINGS.runtime(DeploymentConfig("d", "base"), "m", str(tmp_path))
            await cluster.start_sampler("d.1", spec)
        async with World(tmp_path, cluster) as world:
            await asyncio.sleep(60)
            assert cluster.samplers == {}
            assert (await world.deployments.get("d")).state == "READY"
            await world.sample("r")

    play(scenario)


def test_a_service_that_died_while_it_deleted_a_deployment_finishes_when_it_is_back(tmp_path):
    async def scenario() -> None:
        cluster = SimCluster()
        async with World(tmp_path, cluster) as world:
            await world.ready()
            record = world.records.get(DEPLOYMENTS, "d")
            await world.deployments.close()
            deleted = replace(record, deployment=replace(record.deployment, state="DELETED"))
            await world.records.put(DEPLOYMENTS, "d", deleted)
        assert sorted(cluster.samplers) == ["d.0"]
        async with World(tmp_path, cluster) as world:
            assert cluster.samplers == {}
            assert not (tmp_path / "data/deployments/d").exists()
            await world.ready()

    play(scenario)


# --- everything at once -----------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
def test_nothing_is_lost_and_every_token_is_named_whatever_happens(tmp_path, seed):
    """Random hot loads, re-attaches, deaths and scaling under a stream of requests."""

    async def story(world: World) -> None:
        rng = np.random.default_rng(seed)
        jobs = [world.job("job-a", seed=1), world.job("job-b", seed=2)]
        await world.ready(min_replicas=1, max_replicas=3, max_num_seqs=4)
        attached = jobs[0]
        known: dict[str, str] = {"": ""}

        async def client(name: str) -> None:
            for i in range(8):
                sampled = await world.sample(f"{name}-{i}", max_tokens=600)
                for version, identity in sampled.identities.items():
                    assert known.get(identity, sampled.digests[version]) in (sampled.digests[version], "")

        async with asyncio.TaskGroup() as group:
            clients = [group.create_task(client(f"c{i}")) for i in range(8)]
            for turn in range(12):
                await asyncio.sleep(float(rng.uniform(0.5, 8)))
                event = rng.choice(["load", "load", "load", "attach", "kill", "scale"])
                if event == "attach":
                    attached = jobs[int(rng.integers(2))]
                    await world.deployments.update("d", {"hot_load_trainer_job": attached.id})
                elif event == "kill" and world.cluster.samplers:
                    name = str(rng.choice(sorted(world.cluster.samplers)))
                    if turn % 3 == 0:
                        world.cluster.samplers.pop(name).sim.crash()
                elif event == "scale":
                    await world.deployments.update("d", {"min_replicas": int(rng.integers(1, 4))})
                else:
                    name = f"{attached.id}-s{turn}"
                    saved = await attached.save(name, "base" if rng.random() < 0.3 else "delta")
                    known[name] = saved.digest
                    await world.deployments.hot_load("d", name)
        for task in clients:
            task.result()
        name = f"{attached.id}-last"
        await attached.save(name)
        await world.load(name)
        for replica in (await world.deployments.get("d")).replicas:
            if replica.readiness:
                assert replica.current_snapshot_identity == name
                assert world.serves(attached, name, replica.name)

    tell(tmp_path, story, cluster=SimCluster(config=SimSamplerConfig(mean_tokens=400, spread=0.5)))
