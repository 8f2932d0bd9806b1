"""Downloads CIFAR-10 or CIFAR-100 with TFDS and stores it in a format that needs no TensorFlow to be read.

    python experiments/prepare_data.py --dataset=cifar10 --data_dir=DIR

No other command downloads data sets. Data that are already prepared are left as they are.
"""

import importlib.util
import json
import pathlib
import socket
import sys
import urllib.request

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from robal_jax import cli
from robal_jax.data import cifar
from robal_jax.errors import InputError, one_line

DATA_SETS = ("cifar10", "cifar100")
FILE_FORMAT = "array_record"  # the one that needs no TensorFlow to be read
HOST = "www.cs.toronto.edu"


def check_host(seconds: float = 5.0) -> None:
    """Raises if the download host cannot be reached; TFDS itself would retry for minutes.

    Behind a proxy there is no check, because a direct connection says nothing there.

    Raises:
      InputError: the host cannot be reached.
    """
    if urllib.request.getproxies().keys() & {"https", "all"}:
        return
    try:
        socket.create_connection((HOST, 443), timeout=seconds).close()
    except OSError as error:
        raise InputError(
            f"cannot reach {HOST}:443 ({one_line(error)}); set https_proxy, run this on a machine with "
            f"network access and copy its --data_dir, or use an .npz file with --config.data.path=FILE.npz"
        ) from error


def prepare(name: str, data_dir: str) -> str:
    """Downloads and prepares a data set unless that is already done; returns a message for the user.

    Raises:
      InputError: TensorFlow is missing, the host cannot be reached, the download fails, or the folder holds
        the data in a different format.
    """
    root = cifar.tfds_folder(data_dir)
    folder = cifar.find_tfds(name, data_dir)
    if folder:
        with cifar.reading_file(str(folder), f"delete it to prepare {name} again"):
            kept = json.loads((folder / "dataset_info.json").read_text())["name"]
        if kept != name:
            raise InputError(f"{folder} holds {kept}, not {name}; choose another --data_dir")
    if folder and cifar.has_array_record(folder):
        return f"{name} is already prepared in {folder}"
    if folder:
        raise InputError(
            f"{folder} holds {name} in a different format from {FILE_FORMAT}; choose another --data_dir"
        )
    if importlib.util.find_spec("tensorflow") is None:
        raise InputError(
            "preparing data needs TensorFlow, which reading them does not; "
            "install it with pip install 'robal_jax[data]'"
        )
    check_host()
    import tensorflow_datasets as tfds

    try:
        tfds.builder(name, data_dir=root, file_format=FILE_FORMAT).download_and_prepare()
    except Exception as error:  # requests, TFDS and TensorFlow raise different ones
        raise InputError(f"could not prepare {name} in {root} ({one_line(error)}); run it again") from error
    return f"{name} is prepared; train on it with --config.data.path={root}"


def main(arguments: list[str]) -> None:
    """Prepares the data set that the flags name."""
    texts = {
        "dataset": " or ".join(DATA_SETS),
        "data_dir": "TFDS data folder; TFDS_DATA_DIR by default, or else ~/tensorflow_datasets",
    }
    values = cli.parse(arguments, texts, __doc__)
    if values["dataset"] not in DATA_SETS:
        raise InputError(f"--dataset is {values['dataset']!r}; choose {texts['dataset']}")
    print(prepare(values["dataset"], values["data_dir"]))


if __name__ == "__main__":
    cli.run(main)
