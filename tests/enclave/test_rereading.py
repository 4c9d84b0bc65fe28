"""SIGHUP at the enclave: another list of instances, several epochs of one, and what is refused of it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import grpc.aio
import pytest

from stip_enclave.config import InstanceSettings, Limits
from stip_enclave.instances import Instances
from stip_protocol.errors import ConfigurationError, InstanceRefused, SignatureInvalid
from stip_protocol.release import EPOCHS_LIMIT
from stip_protocol.telemetry import Telemetry
from tests.enclave.toy import Toy

Toys = Callable[..., Toy]


def no_gateway(certificate: bytes) -> grpc.aio.Channel:
    raise AssertionError("nothing is linked here")


def listed(*folders: Path) -> tuple[InstanceSettings, ...]:
    return tuple(InstanceSettings(directory=folder) for folder in folders)


def holding(toy: Toy, *folders: Path) -> Instances:
    telemetry = Telemetry("enclave", simulated=True)
    return Instances(listed(*folders), toy.developer.public_key(), no_gateway, Limits(), telemetry)


def another_epoch(toy: Toy, epoch: int) -> Path:
    """A directory of the same instance."""
    folder = toy.folder.with_name(f"{toy.folder.name}-{epoch}")
    shutil.copytree(toy.folder, folder)
    toy.manifest.model_copy(update={"epoch": epoch}).write(folder / "manifest.json", toy.developer)
    return folder


def test_several_epochs_of_an_instance_are_held_and_told_apart(toys: Toys) -> None:
    toy = toys()
    held = holding(toy, toy.folder, another_epoch(toy, 3)).find(toy.manifest.instance)
    assert sorted(held) == [2, 3]
    assert all(epoch == instance.manifest.epoch for epoch, instance in held.items())


def test_one_epoch_in_two_directories_is_refused(toys: Toys) -> None:
    toy = toys()
    copied = shutil.copytree(toy.folder, toy.folder.with_name("copy"))
    with pytest.raises(ConfigurationError, match=r"epoch 2 of .* twice"):
        holding(toy, toy.folder, copied)


def test_more_epochs_than_a_release_can_name_are_refused(toys: Toys) -> None:
    toy = toys()
    folders = [another_epoch(toy, epoch) for epoch in range(10, 10 + EPOCHS_LIMIT + 1)]
    with pytest.raises(ConfigurationError, match="another epoch"):
        holding(toy, *folders)


async def test_a_new_directory_joins_and_a_bad_one_is_refused_while_the_rest_stays(toys: Toys, tmp_path: Path) -> None:
    toy = toys()
    instances, foreign = holding(toy, toy.folder), toys()
    before = instances.find(toy.manifest.instance)[2]
    with pytest.raises(ConfigurationError, match="2 refused"):
        await instances.reread(listed(tmp_path / "none", toy.folder, foreign.folder, another_epoch(toy, 3)))
    held = instances.find(toy.manifest.instance)
    assert sorted(held) == [2, 3]
    assert held[2] is before
    with pytest.raises(InstanceRefused):
        instances.find(foreign.manifest.instance)


def test_at_start_a_bad_directory_refuses_everything(toys: Toys) -> None:
    toy = toys()
    with pytest.raises(SignatureInvalid):
        holding(toy, toy.folder, toys().folder)


async def test_what_is_no_longer_listed_takes_no_sessions_and_is_forgotten_with_its_last_lease(toys: Toys) -> None:
    toy = toys()
    instances, newer = holding(toy, toy.folder), another_epoch(toy, 3)
    old = instances.find(toy.manifest.instance)[2]
    await old.load(toy.grant)
    await instances.reread(listed(newer))
    assert sorted(instances.find(toy.manifest.instance)) == [3]
    await instances.close_all_but(lambda: {old})
    assert old.loaded  # its sessions go on
    await instances.close_all_but(set)
    assert not old.loaded
    assert not instances._leaving


async def test_closing_an_epoch_leaves_the_others_open(toys: Toys) -> None:
    toy: Any = toys()
    instances = holding(toy, toy.folder, another_epoch(toy, 3))
    old = instances.find(toy.manifest.instance)[2]
    await old.load(toy.grant)
    await instances.close(toy.manifest.instance, 3)
    await instances.close("0" * 32, None)
    assert old.loaded
    await instances.close(toy.manifest.instance, None)
    with pytest.raises(InstanceRefused, match="not opened"):
        _ = old.encoding
    await old.load(toy.grant)
    assert old.loaded
    await instances.stop()
