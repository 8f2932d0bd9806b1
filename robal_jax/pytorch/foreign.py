"""Files that are taken for weights of PyTorch and are something else, told by their content."""

import pathlib
import zipfile

ARCHIVE = "an archive; unpack it first"
IMAGE = "an image"
ANOTHER = "of another library; load it there, and store its state_dict"
BEGINNINGS = {
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself; fetch that with git lfs pull",
    b"<": "a web page, as after a download that needs a login; download the file again",
    b"{": "a text in JSON; give the file of the weights",
    b"\x93NUMPY": f"an .npy file {ANOTHER}",
    b"\x89HDF": f"an HDF5 file {ANOTHER}",
    b"GGUF": f"a GGUF file {ANOTHER}",
    **{bytes((8, version, 18)): f"an ONNX file {ANOTHER}" for version in range(3, 16)},
    **dict.fromkeys((b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"7z\xbc\xaf", b"Rar!"), ARCHIVE),
    **dict.fromkeys((b"\x89PNG", b"\xff\xd8\xff", b"GIF8"), IMAGE + "; give the file of the weights"),
    b"%pdf": "a PDF; give the file of the weights",
}
"""First bytes, and what the file is; letters of a text are in lower case."""

MAGIC = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # the number in front of what torch.save wrote before PyTorch 1.6


def foreign(path: pathlib.Path) -> str:
    """Says what a file is that ``torch.save`` did not write; '' if it may have.

    Returns:
      What it is; what to do.
    """
    with path.open("rb") as file:
        start = file.read(512)
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for beginning, kind in BEGINNINGS.items():
        if start.startswith(beginning) or text.startswith(beginning):
            return kind
    if not start.strip(b"\0"):
        return (
            f"{'full of zeros' if start else 'empty'}, as after a download that broke off; download it again"
        )
    if start[257:262] == b"ustar":
        return ARCHIVE
    if start.startswith(b"PK"):
        return _archive(path)
    if start.startswith(b"\x80") and MAGIC not in start[:32]:
        return (
            "a pickle, but not of torch.save; store the state_dict with torch.save(model.state_dict(), FILE)"
        )
    return ""


def _archive(path: pathlib.Path) -> str:
    """Says what a zip archive is that ``torch.save`` did not write; '' if it may have."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        return "damaged, or not all of a file; copy or download it again"
    if any(name.endswith("/constants.pkl") for name in names):
        return "a TorchScript model, which is code; store torch.jit.load(FILE).state_dict() with torch.save"
    if any(name.endswith("/data.pkl") for name in names):
        return ""
    if any(name.endswith((".npy", ".h5")) for name in names):
        return f"{'an .npz' if names[0].endswith('.npy') else 'a .keras'} file {ANOTHER}"
    return ARCHIVE
