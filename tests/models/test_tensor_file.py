from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import numpy as safetensors

from models.tensor_file import views

KINDS = ("float64", "float32", "float16", "int64", "int32", "uint64", "uint32", "uint16", "uint8")


@given(
    st.dictionaries(
        st.text(min_size=1, max_size=5).filter(lambda name: name != "__metadata__"),
        st.tuples(st.sampled_from(KINDS), st.lists(st.integers(0, 4), max_size=3)),
        max_size=6,
    )
)
def test_the_tensors_are_those_that_safetensors_wrote(shapes: dict[str, tuple[str, list[int]]]) -> None:
    tensors = {
        name: (np.arange(np.prod(shape)) % 200).astype(kind).reshape(shape) for name, (kind, shape) in shapes.items()
    }
    found = views(safetensors.save(tensors, metadata={"by": "test"}))
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape)
        assert np.array_equal(found[name], tensor)


def test_the_numbers_are_not_copied() -> None:
    content = safetensors.save({"a": np.zeros(3, np.float32)})
    assert not views(content)["a"].flags.owndata


def file(header: Any, numbers: bytes = b"") -> bytes:
    told = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(told).to_bytes(8, "little") + told + numbers


def entry(start: int = 0, end: int = 4, shape: Any = (1,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x05\0\0\0\0\0\0\0{}",
        b"\xff" * 100,
        file(b""),
        file(b"["),
        file(b"\xff\xfe"),
        file([1]),
        file({"a": 1}),
        file({"a": entry()}),
        file({"a": entry()}, b"12345"),
        file({"a": entry(), "b": entry()}, b"1234"),
        file({"a": entry(), "b": entry(2, 6)}, b"123456"),
        file({"a": entry(), "b": entry(8, 12)}, b"123456789012"),
        file({"a": entry(0, 8)}, b"12345678"),
        file({"a": entry(-4, 0)}, b"1234"),
        file({"a": entry(4, 0)}, b"1234"),
        file({"a": entry(shape=(-1, -1))}, b"1234"),
        file({"a": entry(shape=(1 << 40, 1 << 40))}, b"1234"),
        file({"a": entry(shape=(1.5,))}, b"1234"),
        file({"a": entry(shape=(1,) * 40)}, b"1234"),
        file({"a": entry(dtype="BF16")}, b"1234"),
        file({"a": entry(dtype="O")}, b"1234"),
        file({f"t{i}": entry(0, 0, (0,)) for i in range(10_001)}),
    ],
    ids=range(23),
)
def test_what_is_no_such_file_is_refused(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        views(content)


@given(st.binary(max_size=300), st.integers(0, 299), st.integers(0, 255))
def test_damage_gives_tensors_or_a_refusal_and_nothing_else(rest: bytes, at: int, value: int) -> None:
    content = bytearray(safetensors.save({"a": np.arange(8, dtype=np.uint8), "b": np.zeros((2, 2), np.float32)}) + rest)
    content[at % len(content)] = value
    try:
        views(bytes(content))
    except ValueError as error:
        assert str(error)  # noqa: PT017
