"""Archives that somebody made to do harm, all that tar and a recipe's contents can be bent to. Names say how.

Contents are signed by the trusted key wherever that is possible: what a careless or robbed signer lets through must be
refused all the same. `ARCHIVES` maps a name to a function of `Kit` that returns the file.
"""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np
from onnx import ModelProto, TensorProto, helper
from recipes import tiny_graph

from calibration.preprocess import View
from calibration.recipe_file import FOR_PEOPLE, canonical, members_digest, sealed, sha256
from calibration.signing import SigningKey

BLOCK = 512
OUTSIDE = "../outside.txt"


class Kit:
    """A good signed recipe, in parts."""

    def __init__(self, manifest: dict[str, Any], members: dict[str, bytes], key: SigningKey, stranger: SigningKey):
        self.manifest, self.members = manifest, members
        self.key, self.stranger = key, stranger

    def signed(self, changes: dict[str, bytes] | None = None, *, key: SigningKey | None = None, **top: Any) -> bytes:
        """Return the recipe with other members or other keys of the manifest, in good order and signed."""
        members = {**self.members, **(changes or {})}
        manifest = {**self.manifest, "members": listed(members), **top}
        manifest["digest"] = members_digest(
            manifest["members"], [name for name in manifest["members"] if name not in FOR_PEOPLE]
        )
        return packed({"manifest.json": canonical(self.sealed(manifest, key or self.key)), **members})

    def sealed(self, manifest: dict[str, Any], key: SigningKey) -> dict[str, Any]:
        fields = {**manifest["signature"], "key": key.public.key_id}
        fields.pop("ed25519", None)
        seal = sealed({**manifest, "signature": fields})["manifest_sha256"]
        value = key.sign(b"taktsight recipe signature 1\0" + bytes.fromhex(seal))
        return sealed({**manifest, "signature": {**fields, "ed25519": value.hex()}})

    def with_text(self, change: Callable[[str], str]) -> bytes:
        """Return the recipe with a manifest whose text was changed: its signature is over what Python reads in it."""
        text = change(canonical(self.manifest).decode())
        return packed({"manifest.json": text.encode(), **self.members})

    def good(self) -> bytes:
        return packed({"manifest.json": canonical(self.manifest), **self.members})

    def before_the_end(self, extra: bytes) -> bytes:
        """Return the recipe with further blocks behind its last member."""
        return body(self.good()) + extra + bytes(2 * BLOCK)

    def in_front_of_thresholds(self, extra: bytes) -> bytes:
        """Return the recipe with blocks of an extension that is about the thresholds."""
        data = self.good()
        (entry,) = (entry for entry in entries(data) if entry.name == "thresholds.json")
        return data[: entry.offset] + extra + data[entry.offset :]

    def header(self, name: str, change: Callable[[bytearray], None]) -> bytes:
        """Return the recipe with one header changed and its checksum made right again."""
        data = bytearray(self.good())
        (entry,) = (entry for entry in entries(bytes(data)) if entry.name == name)
        header = data[entry.offset : entry.offset + BLOCK]
        change(header)
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        data[entry.offset : entry.offset + BLOCK] = header
        return bytes(data)


def listed(members: dict[str, bytes]) -> dict[str, Any]:
    return {name: {"bytes": len(data), "sha256": sha256(data)} for name, data in members.items()}


def packed(members: dict[str, bytes], tar_format: int = tarfile.USTAR_FORMAT) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return buffer.getvalue()


def entries(data: bytes) -> list[tarfile.TarInfo]:
    with tarfile.open(fileobj=io.BytesIO(data)) as archive:
        return archive.getmembers()


def body(data: bytes) -> bytes:
    """Return an archive without its end."""
    last = entries(data)[-1]
    return data[: last.offset_data + last.size + -last.size % BLOCK]


def block(name: str, kind: bytes = tarfile.REGTYPE, content: bytes = b"", link: str = "", **facts: Any) -> bytes:
    """Return one member as blocks."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname, entry.size = kind, link, len(content)
    for fact, value in facts.items():
        setattr(entry, fact, value)
    return entry.tobuf(tarfile.GNU_FORMAT) + content + bytes(-len(content) % BLOCK)


def pax(**records: str) -> bytes:
    text = b""
    for key, value in records.items():
        line = f" {key.replace('__', '.')}={value}\n".encode()
        length = len(line) + 2 if len(line) < 98 else len(line) + 3
        text += str(length).encode() + line
    return block("././@PaxHeader", tarfile.XHDTYPE, text)


def external_tensor() -> TensorProto:
    tensor = TensorProto(name="level", data_type=TensorProto.FLOAT, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../../../etc/hostname")
    return tensor


def external_graph(where: str) -> bytes:
    """Return a graph that wants its weights from another file."""
    model = ModelProto.FromString(tiny_graph(View(32, 32, colour=False, reference_size=(32, 32))))
    tensor = external_tensor()
    if where == "initializer":
        model.graph.initializer[0].CopyFrom(tensor)
    elif where == "constant":
        model.graph.node.append(helper.make_node("Constant", [], ["c"], value=tensor))
    elif where == "subgraph":
        inner = helper.make_graph([], "inner", [], [], initializer=[tensor])
        model.graph.node.append(helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner))
    elif where == "function":
        node = helper.make_node("Constant", [], ["c"], value=tensor)
        model.functions.append(helper.make_function("d", "f", [], ["c"], [node], []))
    else:
        model.graph.sparse_initializer.add().values.CopyFrom(tensor)
    return bytes(model.SerializeToString())


def npy(header: bytes, content: bytes = b"") -> bytes:
    return b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + content


def object_array() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    return buffer.getvalue()


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, np.zeros((1, 1, 32, 32), np.float32))
    return buffer.getvalue()


def zipped(kit: Kit) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, data in kit.members.items():
            archive.writestr(name, data)
    return buffer.getvalue()


def changed(kit: Kit, member: str, **values: Any) -> bytes:
    """Return the recipe with other values in one of its JSON members, as JSON writes them, NaN too."""
    return kit.signed({member: json.dumps({**json.loads(kit.members[member]), **values}).encode()})


def view(kit: Kit, **values: Any) -> bytes:
    return changed(kit, "preparation.json", view={**json.loads(kit.members["preparation.json"])["view"], **values})


def png_bomb(kit: Kit) -> bytes:
    data = bytearray(kit.members["reference.png"])
    data[16:24] = (60_000).to_bytes(4, "big") * 2
    return kit.signed({"reference.png": bytes(data)})


def put(place: int, value: bytes) -> Callable[[bytearray], None]:
    def change(header: bytearray) -> None:
        header[place : place + len(value)] = value

    return change


def list_size(size: Any) -> Callable[[Kit], bytes]:
    def make(kit: Kit) -> bytes:
        members = listed(kit.members)
        members["thresholds.json"]["bytes"] = size
        return kit.signed(members=members)

    return make


ARCHIVES: dict[str, Callable[[Kit], bytes]] = {
    "a name that climbs out": lambda kit: kit.before_the_end(block(OUTSIDE, content=b"x")),
    "a name that climbs out, listed": lambda kit: kit.signed({OUTSIDE: b"x"}),
    "an absolute name": lambda kit: kit.before_the_end(block("/etc/taktsight-was-here", content=b"x")),
    "an absolute name, listed": lambda kit: kit.signed({"/etc/taktsight-was-here": b"x"}),
    "a name below this folder": lambda kit: kit.header("thresholds.json", put(0, b"./thresholds.json")),
    "a path in the prefix field": lambda kit: kit.header("thresholds.json", put(345, b"../..")),
    "a name with a zero inside": lambda kit: kit.header("thresholds.json", put(0, b"thresholds.json\0/../x")),
    "a name that is no ASCII": lambda kit: kit.header("thresholds.json", put(0, b"\xff\xfe")),
    "a symbolic link": lambda kit: kit.before_the_end(block("report.html", tarfile.SYMTYPE, link="/etc/passwd")),
    "a member that is a symbolic link": lambda kit: kit.header("thresholds.json", put(156, b"2/etc/passwd")),
    "a hard link": lambda kit: kit.before_the_end(block("reference.png", tarfile.LNKTYPE, link="thresholds.json")),
    "a member that is a hard link": lambda kit: kit.header("thresholds.json", put(156, b"1selftest.json")),
    "a link's name on a plain file": lambda kit: kit.header("thresholds.json", put(157, b"/etc/passwd")),
    "a character device": lambda kit: kit.before_the_end(block("x", tarfile.CHRTYPE, devmajor=1, devminor=5)),
    "a block device": lambda kit: kit.header("thresholds.json", put(156, b"4")),
    "a fifo": lambda kit: kit.header("thresholds.json", put(156, b"6")),
    "a folder": lambda kit: kit.before_the_end(block("staging", tarfile.DIRTYPE)),
    "a contiguous file": lambda kit: kit.header("thresholds.json", put(156, b"7")),
    "a file of the old kind": lambda kit: kit.header("thresholds.json", put(156, b"\0")),
    "an unknown kind": lambda kit: kit.header("thresholds.json", put(156, b"Z")),
    "a repeated member": lambda kit: kit.before_the_end(block("thresholds.json", content=b"{}")),
    "a repeated manifest": lambda kit: kit.before_the_end(block("manifest.json", content=b"{}")),
    "an unlisted member": lambda kit: kit.before_the_end(block("model.pkl", content=b"\x80\x04K\x01.")),
    "an unlisted member of a known name": lambda kit: packed(
        {"manifest.json": canonical(kit.sealed(without(kit, "report.html"), kit.key)), **kit.members}
    ),
    "a missing member": lambda kit: packed(
        {"manifest.json": canonical(kit.manifest), **{k: v for k, v in kit.members.items() if k != "thresholds.json"}}
    ),
    "a required member that is not listed": lambda kit: packed(
        {"manifest.json": canonical(kit.sealed(without(kit, "selftest.npy"), kit.key)), **kit.members}
    ),
    "a manifest that comes last": lambda kit: packed({**kit.members, "manifest.json": canonical(kit.manifest)}),
    "no manifest": lambda kit: packed(kit.members),
    "the signature of a stranger": lambda kit: kit.signed(key=kit.stranger),
    "a stranger's signature in our key's name": lambda kit: packed(
        {"manifest.json": canonical(impostor(kit)), **kit.members}
    ),
    "a stripped signature": lambda kit: packed(
        {"manifest.json": canonical(sealed({k: v for k, v in kit.manifest.items() if k != "signature"})), **kit.members}
    ),
    "the signature of another recipe": lambda kit: packed(
        {"manifest.json": canonical(sealed({**kit.manifest, "product": "other"})), **kit.members}
    ),
    "a newer revision under an old signature": lambda kit: packed(
        {"manifest.json": canonical(sealed(with_revision(kit, 10**9))), **kit.members}
    ),
    "a signature full of zeros": lambda kit: packed(
        {
            "manifest.json": canonical(
                sealed({**kit.manifest, "signature": {**kit.manifest["signature"], "ed25519": "0" * 128}})
            ),
            **kit.members,
        }
    ),
    "a size beyond the file": lambda kit: kit.header("thresholds.json", put(124, b"77777777777")),
    "a manifest of 8 GiB": lambda kit: kit.header("manifest.json", put(124, b"77777777777")),
    "a size in base 256": lambda kit: kit.header("thresholds.json", put(124, b"\x80" + b"\x7f" * 11)),
    "a negative size": lambda kit: kit.header("thresholds.json", put(124, b"\xff" * 11 + b"\x00")),
    "a size with a sign": lambda kit: kit.header("thresholds.json", put(124, b"-0000000512")),
    "no size": lambda kit: kit.header("thresholds.json", put(124, b"\0" * 12)),
    "another size than listed": lambda kit: kit.header("report.html", put(124, b"00000000001")),
    "a sparse file": lambda kit: kit.header("thresholds.json", put(156, b"S")),
    "a pax path": lambda kit: kit.in_front_of_thresholds(pax(path=OUTSIDE)),
    "a pax size": lambda kit: kit.in_front_of_thresholds(pax(size="-512")),
    "a pax sparse map": lambda kit: kit.in_front_of_thresholds(pax(GNU__sparse__size="9" * 18, GNU__sparse__major="1")),
    "a global pax header": lambda kit: kit.in_front_of_thresholds(
        block("././@PaxHeader", tarfile.XGLTYPE, b"12 path=x.y\n")
    ),
    "a GNU long name": lambda kit: kit.in_front_of_thresholds(
        block("././@LongLink", tarfile.GNUTYPE_LONGNAME, b"../" * 200 + b"x\0")
    ),
    "a GNU long link": lambda kit: kit.in_front_of_thresholds(
        block("././@LongLink", tarfile.GNUTYPE_LONGLINK, b"/etc/passwd\0")
    ),
    "the GNU format": lambda kit: packed({"manifest.json": canonical(kit.manifest), **kit.members}, tarfile.GNU_FORMAT),
    "a gzipped tar": lambda kit: gzip.compress(kit.good()),
    "a bzipped tar": lambda kit: bz2.compress(kit.good()),
    "an xz tar": lambda kit: lzma.compress(kit.good()),
    "a zip": zipped,
    "an empty file": lambda _: b"",
    "zeros": lambda _: bytes(20 * BLOCK),
    "a wrong checksum": lambda kit: kit.good()[:148] + b"000000\0 " + kit.good()[156:],
    "something behind the end": lambda kit: kit.good() + b"#!/bin/sh\n",
    "a second archive behind the end": lambda kit: kit.good() + kit.signed(product="second"),
    "something in the padding": lambda kit: (
        kit.good()[: BLOCK + len(canonical(kit.manifest))]
        + b"!"
        + kit.good()[BLOCK + len(canonical(kit.manifest)) + 1 :]
    ),
    "a key given twice in the manifest": lambda kit: kit.with_text(
        lambda text: text.replace('"product"', '"product": "other",\n "product"', 1)
    ),
    "NaN in the manifest": lambda kit: kit.with_text(lambda text: text.replace('"seed": 0', '"seed": NaN', 1)),
    "a manifest nested deep": lambda kit: kit.with_text(lambda _: "[" * 200_000),
    "a manifest of another kind": lambda kit: kit.with_text(lambda _: "[]"),
    "a format that is no number": lambda kit: kit.signed(format="1"),
    "a format of later": lambda kit: kit.signed(format=4),
    "a negative size in the manifest": list_size(-1),
    "a fraction as size in the manifest": list_size(1.5),
    "true as size in the manifest": list_size(True),
    "a product that is a list": lambda kit: kit.signed(product=["x"]),
    "a product without end": lambda kit: kit.signed(product="x" * 10_000),
    "a threshold that is NaN": lambda kit: changed(kit, "thresholds.json", score=float("nan")),
    "a threshold that is infinite": lambda kit: changed(kit, "thresholds.json", score=float("inf")),
    "a threshold of 1e999": lambda kit: kit.signed(
        {"thresholds.json": kit.members["thresholds.json"].replace(b'"score": 0.1', b'"score": 1e999')}
    ),
    "a threshold that is text": lambda kit: changed(kit, "thresholds.json", score="0.1"),
    "a threshold given twice": lambda kit: kit.signed(
        {"thresholds.json": kit.members["thresholds.json"].replace(b"{", b'{"score": 9, ', 1)}
    ),
    "a threshold of another name": lambda kit: changed(kit, "thresholds.json", other=1),
    "a negative view": lambda kit: view(kit, height=-32),
    "an endless view": lambda kit: view(kit, width=2**40),
    "a region outside the reference": lambda kit: view(
        kit, region={"x_px": 0, "y_px": 0, "width_px": 2**31, "height_px": 1}
    ),
    "a gamma of zero": lambda kit: view(kit, gamma=0.0),
    "a self-test that is a pickle": lambda kit: kit.signed({"selftest.npy": object_array()}),
    "a self-test that is an npz": lambda kit: kit.signed({"selftest.npy": npz()}),
    "a self-test of a huge shape": lambda kit: kit.signed(
        {"selftest.npy": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999, 1, 32, 32), }\n")}
    ),
    "a self-test whose header is code": lambda kit: kit.signed({"selftest.npy": npy(b"__import__('os').getpid()\n")}),
    "a self-test of nothing": lambda kit: kit.signed(
        {
            "selftest.npy": npy(b"{'descr': '<f4', 'fortran_order': False, 'shape': (0, 1, 32, 32), }\n"),
            "selftest.json": b'{"scores": [], "map_peaks": []}',
        }
    ),
    "a self-test with other answers": lambda kit: changed(kit, "selftest.json", scores=[0.5, 0.5]),
    "a picture of 3.6 gigapixels": png_bomb,
    "a picture that is none": lambda kit: kit.signed({"reference.png": b"GIF89a" + bytes(100)}),
    "a graph that is none": lambda kit: kit.signed({"detector.onnx": b"MZ" + bytes(100)}),
    "an empty graph": lambda kit: kit.signed({"detector.onnx": b""}),
    **{
        f"a graph with weights in another file ({where})": lambda kit, where=where: kit.signed(
            {"detector.onnx": external_graph(where)}
        )
        for where in ("initializer", "constant", "subgraph", "function", "sparse")
    },
}


def without(kit: Kit, name: str) -> dict[str, Any]:
    members = {key: value for key, value in kit.manifest["members"].items() if key != name}
    digest = members_digest(members, [key for key in members if key not in FOR_PEOPLE])
    return {**kit.manifest, "members": members, "digest": digest}


def impostor(kit: Kit) -> dict[str, Any]:
    manifest = kit.sealed(kit.manifest, kit.stranger)
    return sealed({**manifest, "signature": {**manifest["signature"], "key": kit.key.public.key_id}})


def with_revision(kit: Kit, revision: int) -> dict[str, Any]:
    return {**kit.manifest, "signature": {**kit.manifest["signature"], "revision": revision}}
