"""The client that provisions what it needs."""

from typing import Any

import pytest
from sdk_world import FakeService

from rlorch.errors import ConfigError, UserError
from rlorch.sdk.connection import HUB, Connection
from rlorch.sdk.managed import ManagedServiceClient
from rlorch.sdk.service_client import ServiceClient


@pytest.fixture
def managed(service: FakeService) -> Any:
    """`from_firetitan_config` on the service in memory."""
    HUB._connections["local:memory"] = Connection(HUB, "local:memory", link=service)

    def make(**fields: Any) -> ManagedServiceClient:
        return ServiceClient.from_firetitan_config(base_url="local:memory", base_model="base", **fields)

    yield make
    HUB.close()


def test_nothing_starts_before_it_is_needed_and_everything_once(managed: Any, service: FakeService) -> None:
    client = managed(trainer_job_id="mine", cleanup_trainer_on_close=False, cleanup_deployment_on_close="delete")
    assert not service.calls
    model = client.create_training_client()
    assert client.trainer_job_id == model.job_id == "mine"
    assert len(service.called("jobs.create")) == len(service.called("deployments.create")) == 1
    saved = model.save_weights_for_sampler_ext("s0")
    sampler = client.create_deployment_sampler(saved.path)
    assert service.called("deployments.hot_load")[0]["identity"] == saved.snapshot_name
    assert sampler.deployment_id == client.deployment_id
    client.close()
    assert not service.deployments
    assert "mine" in service.jobs


def test_an_adapter_is_referred_to_its_own_base_and_full_weights_to_a_trainer_beside(
    managed: Any, service: FakeService
) -> None:
    with managed(lora_rank=8, create_deployment=False) as client:
        assert client.create_training_client().lora_rank == 8
        client.create_reference_client()
        assert client.reference_job_id is None
        with pytest.raises(UserError, match="no deployment"):
            client.create_deployment_sampler()
    with managed(create_deployment=False) as client, pytest.raises(UserError, match="reference_required"):
        client.create_reference_client()
    with managed(reference_required=True, create_deployment=False) as client:
        assert client.reference_job_id != client.trainer_job_id
        created = [call["config"].forward_only for call in service.called("jobs.create")[-2:]]
        assert sorted(created) == [False, True]


def test_a_deployment_that_is_there_is_attached_and_not_ended(managed: Any, service: FakeService) -> None:
    with managed(deployment_id="serving") as first:
        assert first.deployment_id == "serving"
    with managed(deployment_id="serving", trainer_job_id="second", cleanup_deployment_on_close="delete") as second:
        assert second.deployment_id == "serving"
        assert service.deployments["serving"].config.hot_load_trainer_job == "second"
        assert second.requires_initial_sampler_sync() is False
    assert "serving" in service.deployments


def test_a_wrong_field_names_the_nearest_one(managed: Any) -> None:
    with pytest.raises(ConfigError, match="did you mean 'training_shape_id'"):
        managed(training_shape="x")
    with pytest.raises(ConfigError, match="exclude each other"):
        managed(lora_rank=8, max_lora_rank=16)
