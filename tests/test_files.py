import json
import os
import resource
import signal
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from safetensors.numpy import save_file

from keras_dwd.files import ArrayFile, FileError, read_arrays, read_json, write_arrays, write_json

DTYPES = ("float32", "float64", "float16", "int64", "int32", "uint32", "uint8", "bool")


@st.composite
def arrays(draw):
    dtype = draw(st.sampled_from([*DTYPES, ml_dtypes.bfloat16]))
    shape = draw(npst.array_shapes(min_dims=0, min_side=0, max_side=3))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    return (10 * rng.normal(size=shape)).astype(dtype)


@settings(max_examples=50, deadline=None)
@given(
    st.dictionaries(st.text(st.characters(exclude_categories=["Cs"]), max_size=5), arrays()),
    st.dictionaries(st.text(max_size=3), st.integers() | st.none() | st.text(max_size=3)),
)
def test_arrays_come_back_as_they_were(tmp_path_factory, held, about):
    held.pop("__metadata__", None)
    path = tmp_path_factory.mktemp("files") / "a.safetensors"
    write_arrays(path, held, about)
    found, said = read_arrays(path)
    assert said == about
    assert found.keys() == held.keys()
    for name, array in held.items():
        assert (found[name].dtype, found[name].shape) == (array.dtype, array.shape)
        assert found[name].tobytes() == array.tobytes()
        assert ArrayFile(path)[name].tobytes() == array.tobytes()
    assert [p.name for p in path.parent.iterdir()] == ["a.safetensors"]


def test_a_file_with_any_bit_turned_is_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"w": np.arange(4.0), "n": np.array(3.0)}, {"version": 1})
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in range(8):
            damaged = bytearray(whole)
            damaged[at] ^= 1 << bit
            path.write_bytes(damaged)
            with pytest.raises(FileError, match="damaged"):
                read_arrays(path)
            if at >= len(whole) - 32:  # damage in the array, when only the array is read
                with pytest.raises(FileError, match="damaged"):
                    ArrayFile(path)["w"]
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(FileError, match="damaged"):
            read_arrays(path)


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    save_file({"w": np.zeros(2)}, path)
    with pytest.raises(FileError, match="damaged, or no file of arrays"):
        read_arrays(path)
    save_file({"w": np.zeros(2)}, path, {"about": "[" * 100_000, "checksum": "00000000"})
    with pytest.raises(FileError, match="damaged"):
        read_arrays(path)
    write_arrays(path, {"w": np.zeros(2)}, {})
    with pytest.raises(FileError, match="no array 'v'"):
        ArrayFile(path)["v"]
    with pytest.raises(OSError, match="No such file"):
        read_arrays(tmp_path / "none")


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", "\xff", "NaN", '{"a": Infinity}', "[" * 100_000, '{"a": 1} x']
)
def test_json_that_is_none_is_refused(tmp_path, text):
    path = tmp_path / "a.json"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(FileError, match=r"a\.json"):
        read_json(path)


def test_json_comes_back_and_nothing_that_is_no_json_is_written(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"a": [1, "λ"]})
    with pytest.raises(ValueError, match="Out of range"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": [1, "λ"]}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.long
def test_a_full_disk_leaves_what_was_there(tmp_path):
    """A limit on file sizes interrupts a write in the middle, as a full disk does."""
    path = tmp_path / "a.safetensors"
    write_arrays(path, {"w": np.ones(3)}, {})
    write_json(tmp_path / "a.json", {"a": 1})
    code = (
        "import sys, numpy as np, pathlib\n"
        "from keras_dwd.files import write_arrays, write_json\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "for write in (lambda: write_arrays(folder / 'a.safetensors', {'w': np.ones(10**6)}, {}),\n"
        "              lambda: write_json(folder / 'a.json', {'a': 'x' * 10**7})):\n"
        "    try:\n"
        "        write()\n"
        "    except OSError as error:\n"
        "        print(error)\n"
    )

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10**6, 10**6))

    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.count("File too large") == 2, done.stderr
    np.testing.assert_array_equal(read_arrays(path)[0]["w"], np.ones(3))
    assert json.loads((tmp_path / "a.json").read_text()) == {"a": 1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.json", "a.safetensors"]


def test_a_file_is_on_the_disk_before_it_takes_the_place_of_another(tmp_path, monkeypatch):
    """First the file, then its name, then the folder that has the name; a crash finds one whole."""
    events = []
    sync, replace = os.fsync, os.replace

    def noting_sync(number):
        events.append(("on the disk", os.path.basename(os.readlink(f"/proc/self/fd/{number}"))))
        sync(number)

    def noting_replace(source, target):
        events.append(("in place", os.path.basename(target)))
        replace(source, target)

    monkeypatch.setattr(os, "fsync", noting_sync)
    monkeypatch.setattr(os, "replace", noting_replace)
    for write, name in (
        (lambda path: write_json(path, {"a": 1}), "a.json"),
        (lambda path: write_arrays(path, {"w": np.ones(3)}, {}), "a.safetensors"),
    ):
        events.clear()
        write(tmp_path / name)
        assert [what for what, _ in events] == ["on the disk", "in place", "on the disk"]
        assert events[0][1].startswith(f".{name}.")
        assert [where for _, where in events[1:]] == [name, tmp_path.name]


def test_files_can_be_read_by_others(tmp_path):
    write_json(tmp_path / "a.json", {"a": 1})
    assert (tmp_path / "a.json").stat().st_mode & 0o777 == 0o644
