"""Files of published models: what is read, and that nothing in them runs."""

from __future__ import annotations

import builtins
import contextlib
import io
import os
import pickle
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from scmodelforge.errors import ModelError
from scmodelforge.models.published import reading


def written(path: Path, value: object, protocol: int = 4) -> Path:
    path.write_bytes(pickle.dumps(value, protocol=protocol))
    return path


@pytest.mark.parametrize("protocol", range(6))
def test_dictionaries_of_numbers_are_read(tmp_path: Path, protocol: int) -> None:
    table = {
        "<pad>": 0,
        "ENSG1": np.int16(7),
        "ENSG2": np.float64(0.25),
        "text": np.str_("word"),
        "big": np.dtype(">i4").type(5),
        "many": [1, (2.5, None), True, {3}, frozenset({4})],
        "ordered": OrderedDict(a=1),
    }
    back = reading.read_pickle(written(tmp_path / "d.pkl", table, protocol))
    assert back == table
    assert type(back["ENSG1"]) is int
    assert type(back["ENSG2"]) is float
    assert type(back["text"]) is str


class Calls:
    """Pickles as a call of `function` with `arguments`."""

    def __init__(self, function: object, *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def malicious(marker: Path) -> dict[str, object]:
    shell, code = f"touch {marker}", f"open({str(marker)!r}, 'w')"
    return {
        "system": Calls(os.system, shell),
        "eval": Calls(eval, code),
        "exec": Calls(exec, code),
        "nested": {"a": [1, {"b": (Calls(os.system, shell),)}]},
        "getattr": Calls(getattr, Calls(__import__, "os"), "system"),
        "partial": Calls(__import__("functools").partial, os.system, shell),
        "open": Calls(builtins.open, str(marker), "w"),
        "array": np.array([1, 2]),
        "object dtype": np.dtype([("a", "O")]),
        "torch": Calls(torch.load, str(marker)),
    }


@pytest.mark.parametrize("name", malicious(Path("x")))
@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_nothing_in_a_pickle_runs(tmp_path: Path, name: str, protocol: int) -> None:
    marker = tmp_path / "it-ran"
    path = written(tmp_path / "bad.pkl", malicious(marker)[name], protocol)
    with pytest.raises(ModelError, match="could run code"):
        reading.read_pickle(path)
    assert not marker.exists()


def handmade(*parts: bytes) -> bytes:
    return b"\x80\x04" + b"".join(parts) + b"."


@pytest.mark.parametrize(
    "content",
    [
        handmade(b"cbuiltins\neval\n"),  # a reference alone
        handmade(b"c_codecs\nencode\n"),
        handmade(b"cscmodelforge.models.published.reading\npickle.loads\n"),  # through our own module
        handmade(b"cnumpy\ndtype.__class__\n"),  # a dotted name from an admitted one
        handmade(b"cnumpy\ndtype\n", b"(X\x01\x00\x00\x00Ot", b"R", b"0", b"cos\nsystem\n"),
        handmade(b"c_codecs\nencode\n", b"(X\x01\x00\x00\x00aX\x03\x00\x00\x00zipt", b"R"),
        b"\x80\x04\x8c",  # cut off
        b"",
        b"not a pickle",
    ],
)
def test_crafted_and_damaged_pickles_are_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "bad.pkl"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=r"bad\.pkl"):
        reading.read_pickle(path)


def test_a_pickle_cannot_change_what_the_reader_calls(tmp_path: Path) -> None:
    """BUILD sets attributes of what it is given: here new defaults for the admitted function."""
    state = io.BytesIO()
    pickle.dump((None, {"__defaults__": (1, 2, 3), "marker": 1}), state, protocol=2)
    content = b"\x80\x02" + b"c_codecs\nencode\n" + state.getvalue()[2:-1] + b"b."
    path = tmp_path / "bad.pkl"
    path.write_bytes(content)
    with contextlib.suppress(ModelError):
        reading.read_pickle(path)
    assert reading._encode.__defaults__ is None
    assert not hasattr(reading._encode, "marker")


def test_weights_are_read_from_both_kinds_of_file(tmp_path: Path) -> None:
    state = {"a.weight": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.bin")
    torch.save({"state_dict": {f"module.{k}": v for k, v in state.items()}, "epoch": 3}, tmp_path / "w.ckpt")
    for name in ("w.safetensors", "w.bin", "w.ckpt"):
        back = reading.read_weights(tmp_path / name)
        assert back.keys() == state.keys()
        assert all(torch.equal(back[key], state[key]) for key in state)


def test_weights_that_are_not_weights_are_refused(tmp_path: Path) -> None:
    marker = tmp_path / "it-ran"
    torch.save({"a": Calls(os.system, f"touch {marker}")}, tmp_path / "bad.bin")
    torch.save({"a": torch.ones(1), "b": 3}, tmp_path / "mixed.pt")
    torch.save(torch.ones(1), tmp_path / "one.pt")
    (tmp_path / "cut.bin").write_bytes((tmp_path / "one.pt").read_bytes()[:-40])
    (tmp_path / "text.bin").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    for name in ("bad.bin", "mixed.pt", "one.pt", "cut.bin", "text.bin", "text.safetensors", "missing.bin"):
        with pytest.raises(ModelError, match=name):
            reading.read_weights(tmp_path / name)
    assert not marker.exists()


def test_json_that_is_none_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"a": 1}')
    assert reading.read_json(tmp_path / "a.json") == {"a": 1}
    (tmp_path / "b.json").write_text("{")
    with pytest.raises(ModelError, match=r"b\.json"):
        reading.read_json(tmp_path / "b.json")


def test_other_names_are_listed() -> None:
    reading.require_same_keys({"a", "b"}, {"a", "b", "c"}, {"c"}, "it")
    with pytest.raises(ModelError, match=r"(?s)missing: \['b'\].*left over: \['d'\]"):
        reading.require_same_keys({"a", "b"}, {"a", "d"}, set(), "it")
