"""Files that are taken for weights of PyTorch: the message says what they are."""

import io
import json
import pickle
import tarfile
import zipfile

import numpy as np
import pytest

from robal_jax import pytorch
from robal_jax.errors import InputError


def zipped(*names):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, "x" * 1000)
    return file.getvalue()


def tarred(mode):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode=mode) as archive:
        archive.addfile(tarfile.TarInfo("epoch80.pt"))
    return file.getvalue()


def arrays(save):
    file = io.BytesIO()
    save(file, np.zeros(3))
    return file.getvalue()


FILES = {
    "a web page": (b"<!DOCTYPE html><html>", b"\r\n <HTML>", b"\xef\xbb\xbf<?xml version='1.0'?><Error/>"),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\n",),
    "empty, as after a download": (b"",),
    "full of zeros": (bytes(7), bytes(1000)),
    "a text in JSON": (b'{"meta":{"weight_map": {}}}', json.dumps({"error": "no such file"}).encode()),
    "an .npz file": (arrays(np.savez), arrays(np.savez_compressed)),
    "an .npy file": (arrays(np.save),),
    "a .keras file": (zipped("config.json", "model.weights.h5"),),
    "an HDF5 file": (b"\x89HDF\r\n\x1a\n" + bytes(99),),
    "an ONNX file": (b"\x08\x07\x12\x07pytorch\x1a\x052.1.0", b"\x08\x0a\x12\x04onnx"),
    "a GGUF file": (b"GGUF\x03",),
    "an archive; unpack it": (
        zipped("epoch80.pt"),
        tarred("w"),
        tarred("w:gz"),
        tarred("w:bz2"),
        tarred("w:xz"),
    ),
    "a TorchScript model": (zipped("net/data.pkl", "net/code/a.py", "net/constants.pkl"),),
    "damaged, or not all of a file": (zipped("net/data.pkl", "net/data/0")[:800],),
    "a pickle, but not of torch.save": tuple(pickle.dumps({"a": 1}, protocol) for protocol in (2, 3, 4, 5)),
    "an image": (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0"),
    "a PDF": (b"%PDF-1.5",),
}


@pytest.mark.parametrize("name", ["x.pt", "x.safetensors"])
@pytest.mark.parametrize(("kind", "number"), [(kind, i) for kind in FILES for i in range(len(FILES[kind]))])
def test_what_it_is(tmp_path, name, kind, number):
    (tmp_path / name).write_bytes(FILES[kind][number])
    with pytest.raises(InputError) as raised:
        pytorch.read_weights(tmp_path / name)
    assert str(raised.value).startswith(f"{tmp_path / name} is {kind}")
    assert "; " in str(raised.value)


def test_a_folder(tmp_path):
    with pytest.raises(InputError, match="is a folder; name the file of weights in it"):
        pytorch.read_weights(tmp_path)


@pytest.mark.parametrize("length", [0x3C, 0x7B, 0x25])  # whose headers begin with <, { and %
def test_the_length_of_a_header_is_no_text(tmp_path, length):
    safetensors = pytest.importorskip("safetensors.numpy")
    path = tmp_path / "x.pt"
    for padding in range(300):
        content = safetensors.save({"a.weight": np.zeros(2)}, {"p": "x" * padding})
        if content[0] == length:
            break
    path.write_bytes(content)
    if content[0] == length:
        assert pytorch.read_weights(path).keys() == {"weight"}
