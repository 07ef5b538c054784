"""A hub of its own for each test, closed after it: no thread is left behind."""

import threading
from collections.abc import Iterator

import pytest
from sdk_world import FakeService, connection_to

from rlorch.sdk.connection import Connection, Hub
from rlorch.sdk.service_client import ServiceClient
from rlorch.sdk.training_client import TrainingClient


@pytest.fixture
def hub() -> Iterator[Hub]:
    hub = Hub()
    yield hub
    hub.close()
    assert not [thread for thread in threading.enumerate() if thread.name == "rlorch-sdk"]


@pytest.fixture
def service() -> FakeService:
    return FakeService()


@pytest.fixture
def connection(service: FakeService, hub: Hub) -> Connection:
    return connection_to(service, hub)


@pytest.fixture
def client(connection: Connection) -> Iterator[TrainingClient]:
    session = ServiceClient(connection=connection, job_id="job-1")
    yield session.create_training_client("base")
    session.close()
