"""Key streams: derivation as RFC 5869 says, unbiased integers, normals, determinism."""

import hashlib

import numpy as np
import pytest

from stip_protocol.errors import ConfigurationError
from stip_protocol.keys import KeyStream, derive

from .reference import SALT, hkdf_sha256

ROOT = bytes(range(32))


def test_derivation_is_hkdf_sha256() -> None:
    assert derive(ROOT, "space/residual") == hkdf_sha256(ROOT, SALT, b"space/residual")


def test_labels_and_roots_give_unrelated_seeds() -> None:
    seeds = {derive(root, label) for root in (ROOT, bytes(32)) for label in ("a", "b", "ab")}
    assert len(seeds) == 6


@pytest.mark.parametrize("root", [b"", bytes(31), bytes(33)])
def test_a_root_of_another_length_is_refused(root: bytes) -> None:
    with pytest.raises(ConfigurationError, match="32 bytes"):
        derive(root, "space/residual")


def test_an_empty_label_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="label"):
        derive(ROOT, "")


def test_a_stream_continues_where_it_stopped() -> None:
    whole, parts = KeyStream(ROOT, "a"), KeyStream(ROOT, "a")
    assert whole.bytes(100) == parts.bytes(37) + parts.bytes(63)


def test_a_stream_is_the_same_on_every_machine() -> None:
    stream = KeyStream(ROOT, "golden")
    integers, uniforms = stream.integers(1000, 64), stream.uniforms(8)
    drawn = integers.astype("<i8").tobytes() + uniforms.astype("<f8").tobytes() + stream.bytes(16)
    assert hashlib.sha256(drawn).hexdigest() == "7b075fae9398667065151cc401bd23d1274f100aa7f118a674e810c30df48320"


@pytest.mark.parametrize("bound", [0, -1, (1 << 63) + 1])
def test_bounds_that_have_no_integers_are_refused(bound: int) -> None:
    with pytest.raises(ConfigurationError, match="bound"):
        KeyStream(ROOT, "a").integers(bound, 1)


@pytest.mark.parametrize("count", [0, 1, 2, 3, 199_999])
def test_normals_come_in_any_number(count: int) -> None:
    assert KeyStream(ROOT, "normals").normals(count).shape == (count,)


def test_normals_are_standard() -> None:
    drawn = KeyStream(ROOT, "normals").normals(200_000)
    moments = [(drawn**power).mean() for power in (1, 2, 3, 4)]
    assert moments == pytest.approx([0, 1, 0, 3], abs=0.05)
    assert abs((drawn[:100_000] * drawn[100_000:]).mean()) < 0.01
    assert (np.abs(drawn) < 1.959964).mean() == pytest.approx(0.95, abs=0.003)


def test_a_stream_shows_nothing_of_itself() -> None:
    assert repr(KeyStream(ROOT, "a")) == "KeyStream()"
