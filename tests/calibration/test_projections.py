# SPDX-License-Identifier: Apache-2.0
"""Projections: the decomposition, its file, and every way in which a file can be wrong."""

import errno
import json
import os
from functools import partial

import pytest
import safetensors
import safetensors.torch
import torch

from aqua_attention.calibration.projections import KIND, Projections
from aqua_attention.calibration.statistics import LayerStatistics
from aqua_attention.errors import AquaError

GROUPS, PER_GROUP, DIM, TOKENS = 2, 3, 8, 256
ENERGIES = 2.0 ** -torch.arange(DIM, dtype=torch.float64)  # well apart, so that each direction is determined
MODEL = {
    "shape": {"model_type": "llama", "layers": [[0, 6, GROUPS, DIM], [2, 6, GROUPS, DIM]]},
    "key_weights": [[0.5, -0.25], [1.0, 0.125]],
    "name": "tiny",
}
CALIBRATION = {"text_sha256": "ab" * 32, "tokens": TOKENS, "context": 64, "seed": 0, "library_version": "0"}


def planted(layer):
    """Queries [groups, rows, dim] and keys [groups, tokens, dim] with ENERGIES along random directions."""
    normal = partial(torch.randn, generator=torch.Generator().manual_seed(layer), dtype=torch.float64)
    directions = torch.linalg.qr(normal(GROUPS, DIM, DIM)).Q
    spread = ENERGIES[:, None] * directions.transpose(-1, -2)
    return normal(GROUPS, TOKENS * PER_GROUP, DIM) @ spread, normal(GROUPS, TOKENS, DIM) @ spread + 0.1


def statistics_of(query, key):
    return LayerStatistics(
        query_gram=query.transpose(-1, -2) @ query,
        key_gram=key.transpose(-1, -2) @ key,
        key_sum=key.sum(1),
        query_count=query.shape[1],
        key_count=key.shape[1],
    )


def make(basis="aqua"):
    statistics = {layer: statistics_of(*planted(layer)) for layer in (0, 2)}
    return Projections.from_statistics(statistics, MODEL, CALIBRATION, basis)


@pytest.fixture
def path(tmp_path):
    """A good file."""
    make().save(tmp_path / "p.safetensors")
    return tmp_path / "p.safetensors"


def edit(path, metadata=None, **tensors):
    """Write the file again with other tensors (None: without) and metadata (a function of it, or raw text)."""
    with safetensors.safe_open(path, framework="pt") as file:
        raw = file.metadata()[KIND]
    edits = {f"layers.2.{name}": tensor for name, tensor in tensors.items()}
    content = safetensors.torch.load_file(path) | edits
    if callable(metadata):
        raw = json.loads(raw)
        metadata(raw)
        raw = json.dumps(raw)
    elif metadata is not None:
        raw = metadata
    content = {name: tensor for name, tensor in content.items() if tensor is not None}
    safetensors.torch.save_file(content, path, {KIND: raw})


def refusal(path):
    with pytest.raises(AquaError) as error:
        Projections.load(path)
    assert str(path) in str(error.value)
    assert "aqua calibrate" in str(error.value)  # the remedy
    return str(error.value)


@pytest.mark.parametrize("layer", [0, 2])
def test_the_rotation_is_the_right_singular_vectors_of_stacked_queries_and_keys(layer):
    rotation = make().layers[layer].rotation
    query, key = planted(layer)
    right = torch.linalg.svd(torch.cat([query, key], 1), full_matrices=False).Vh.transpose(-1, -2)
    cosines = (rotation.double() * right).sum(-2)
    torch.testing.assert_close(cosines.abs(), torch.ones_like(cosines), rtol=0, atol=1e-6)


def test_the_rotation_is_orthogonal_and_sorted_by_falling_energy():
    for layer in make().layers.values():
        assert layer.rotation.dtype == torch.float32
        product = layer.rotation.transpose(-1, -2) @ layer.rotation
        torch.testing.assert_close(product, torch.eye(DIM).expand_as(product))
        assert (layer.energy.diff(dim=-1) < 0).all()
        # The free sign of an eigenvector is fixed by its largest entry.
        assert (layer.rotation.amax(-2) >= -layer.rotation.amin(-2)).all()
        torch.testing.assert_close(layer.energy.sum(-1), torch.ones(GROUPS))


@pytest.mark.parametrize("basis", ["aqua", "none"])
def test_the_rms_and_energy_are_those_of_rotated_queries_and_keys(basis):
    projection = make(basis).layers[2]
    query, key = (states @ projection.rotation.double() for states in planted(2))
    torch.testing.assert_close(projection.query_rms.double(), query.square().mean(1).sqrt(), rtol=1e-6, atol=0)
    torch.testing.assert_close(projection.key_rms.double(), key.square().mean(1).sqrt(), rtol=1e-6, atol=0)
    squares = torch.cat([query, key], 1).square().sum(1)
    energy = squares / squares.sum(-1, keepdim=True)
    torch.testing.assert_close(projection.energy.double(), energy, rtol=1e-6, atol=0)


def test_basis_none_rotates_nothing_and_can_be_changed_both_ways():
    plain = make().with_basis("none")
    back = plain.with_basis("aqua")
    assert torch.equal(plain.layers[0].rotation, torch.eye(DIM).expand(GROUPS, DIM, DIM))
    assert torch.equal(back.layers[0].rotation, make().layers[0].rotation)
    assert (plain.basis, back.basis) == ("none", "aqua")


def test_an_unknown_basis_is_refused():
    with pytest.raises(AquaError, match="basis is 'pca': it must be one of aqua, svd, none"):
        make().with_basis("pca")


def test_infinite_statistics_are_refused_with_the_layer_named():
    query, key = planted(0)
    with pytest.raises(AquaError, match="layer 5 gave NaN or infinite"):
        Projections.from_statistics({5: statistics_of(query, key / 0)}, MODEL, CALIBRATION)


@pytest.mark.parametrize("basis", ["aqua", "none"])
def test_a_saved_file_loads_bit_for_bit(tmp_path, basis):
    before = make(basis)
    before.save(tmp_path / "p")
    after = Projections.load(tmp_path / "p")
    assert list(after.layers) == list(after.statistics) == [0, 2]
    for index, layer in before.layers.items():
        for part, other in ((layer, after.layers[index]), (before.statistics[index], after.statistics[index])):
            for name, value in vars(part).items():
                found = getattr(other, name)
                assert torch.equal(found, value) if isinstance(value, torch.Tensor) else found == value, name
    assert (after.model, after.calibration, after.basis) == (MODEL, CALIBRATION, basis)


def test_the_same_statistics_give_the_same_bytes(path, tmp_path):
    for projections in (make(), Projections.load(path)):
        projections.save(tmp_path / "again")
        assert (tmp_path / "again").read_bytes() == path.read_bytes()


@pytest.mark.parametrize("step", ["os.fsync", "os.fdopen"])
def test_a_full_disk_keeps_the_older_file_and_leaves_nothing_else(path, monkeypatch, step):
    older = path.read_bytes()

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(step, full)
    with pytest.raises(AquaError, match=r"cannot write .*No space left on device"):
        make("none").save(path)
    with pytest.raises(AquaError, match="No space left on device"):
        make().save(path.parent / "new")
    monkeypatch.undo()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert path.read_bytes() == older


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    assert "no such projections file: make one with `aqua calibrate MODEL -o" in refusal(tmp_path / "gone")
    assert refusal(tmp_path) == f"{tmp_path} is a folder: give the file that `aqua calibrate` wrote"


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_a_truncated_file_is_refused(path, size):
    path.write_bytes(path.read_bytes()[:size])
    assert "not a complete safetensors file" in refusal(path)


@pytest.mark.parametrize(
    "content", [bytes(range(256)) * 40, b"some words " * 9, b'{"a": [1, 2]}', b"{{{{{{{{{"], ids=len
)
def test_a_file_that_is_no_safetensors_file_is_no_projections_file(path, content):
    path.write_bytes(content)
    assert refusal(path).endswith("is no projections file: make one with `aqua calibrate MODEL -o NAME.safetensors`")


@pytest.mark.parametrize("metadata", [None, {"format": "pt"}])
def test_a_safetensors_file_of_something_else_is_refused(path, metadata):
    safetensors.torch.save_file({"weight": torch.ones(3)}, path, metadata)
    assert "a safetensors file, but not of AQUA projections" in refusal(path)


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_another_format_version_is_refused_naming_both(path, version):
    edit(path, lambda metadata: metadata.update(format_version=version))
    assert f"format version {version!r}, this library reads 1: upgrade" in refusal(path)


@pytest.mark.parametrize("raw", ["", "{", "[]", "3", "null", '"text"', "{}"])
def test_damaged_metadata_is_refused(path, raw):
    edit(path, metadata=raw)
    assert "its metadata is damaged" in refusal(path)


@pytest.mark.parametrize("name", ["model", "calibration", "basis", "sha256"])
def test_incomplete_metadata_is_refused_naming_what_is_missing(path, name):
    edit(path, lambda metadata: metadata.pop(name))
    assert f"its metadata is incomplete (KeyError('{name}'))" in refusal(path)


@pytest.mark.parametrize("model", [None, {}, {"shape": {}}, {"shape": {"layers": [[0, 6, 2]]}}])
def test_metadata_with_a_damaged_model_is_refused(path, model):
    edit(path, lambda metadata: metadata.update(model=model))
    assert "its metadata is incomplete" in refusal(path)


@pytest.mark.parametrize("name", ["rotation", "query_gram", "key_gram", "key_sum", "counts"])
def test_each_missing_reshaped_retyped_or_nan_tensor_is_refused_by_name(path, name):
    good, content = path.read_bytes(), safetensors.torch.load_file(path)[f"layers.2.{name}"]
    edit(path, **{name: None})
    assert f"tensor layers.2.{name} is missing" in refusal(path)
    path.write_bytes(good)
    edit(path, **{name: content[:1]})
    assert f"layers.2.{name} is {content.dtype} {(1, *content.shape[1:])}, not {content.dtype}" in refusal(path)
    path.write_bytes(good)
    edit(path, **{name: content.to(torch.bfloat16)})
    assert f"tensor layers.2.{name} is torch.bfloat16" in refusal(path)
    if name != "counts":
        for value in (torch.nan, torch.inf):
            path.write_bytes(good)
            edit(path, **{name: content.index_fill(0, torch.tensor(1), value)})
            assert f"tensor layers.2.{name} holds NaN or infinity" in refusal(path)


def test_a_rotation_that_is_not_orthogonal_is_refused(path):
    edit(path, rotation=safetensors.torch.load_file(path)["layers.2.rotation"] * 1.001)
    assert "the rotation of layer 2 is not orthogonal (2.0e-03)" in refusal(path)


def test_counts_of_nothing_are_refused(path):
    edit(path, counts=torch.tensor([5, 0]))
    assert "layer 2 counts 5 queries and 0 keys" in refusal(path)


@pytest.mark.parametrize("change", ["key_sum", "rotation", "counts"])
def test_changed_content_of_the_right_form_is_refused(path, change):
    content = safetensors.torch.load_file(path)
    changed = {
        "key_sum": lambda: content["layers.2.key_sum"] * 1.0001,
        "rotation": lambda: content["layers.2.rotation"].flip(-1),  # orthogonal still
        "counts": lambda: content["layers.2.counts"] + 1,
    }
    edit(path, **{change: changed[change]()})
    assert "its content was changed after it was written" in refusal(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_that_does_not_belong_is_refused(path, dtype):
    edit(path, extra=torch.ones(2, dtype=dtype))
    assert "holds tensors that do not belong in it (layers.2.extra)" in refusal(path)


@pytest.mark.parametrize("change", [{"basis": "foo"}, {"calibration": None}])
def test_changed_metadata_is_refused(path, change):
    edit(path, lambda metadata: metadata.update(change))
    assert "its content was changed after it was written" in refusal(path)


def test_the_key_pca_basis_is_the_principal_components_of_the_centred_keys():
    generator = torch.Generator().manual_seed(11)
    key = torch.randn(1, 1, 400, 6, generator=generator) * torch.tensor([1.0, 5, 2, 4, 3, 0.5]) + 7.0
    query = torch.randn(1, 2, 400, 6, generator=generator)
    layer = LayerStatistics.of(query, key)
    projections = Projections.from_statistics({0: layer}, {}, {}, basis="key-pca")
    centred = key[0, 0].double() - key[0, 0].double().mean(0)
    expected = torch.linalg.svd(centred, full_matrices=False).Vh.T
    found = projections.layers[0].rotation[0].double()
    assert torch.allclose((found.T @ expected).abs(), torch.eye(6, dtype=torch.float64), atol=1e-3)


def test_two_halves_merge_to_the_whole_and_other_models_are_refused():
    generator = torch.Generator().manual_seed(12)
    query, key = (torch.randn(2, heads, 50, 6, generator=generator) for heads in (4, 2))
    shape = {"model_type": "llama", "layers": [[0, 4, 2, 6]]}
    model = {"shape": shape, "key_weights": [[0.1, 0.2, 0.3, 0.4]]}

    def projections(rows, model=model, **changes):
        statistics = {0: LayerStatistics.of(query[rows], key[rows])}
        return Projections.from_statistics(statistics, model, {"tokens": 50, "context": 50}, **changes)

    whole, both = projections(slice(0, 2)), projections(slice(0, 1)).merged(projections(slice(1, 2)))
    assert both.calibration["tokens"] == 100
    assert both.calibration["context"] == 50
    gram, expected = both.statistics[0].query_gram, whole.statistics[0].query_gram
    assert float((gram - expected).abs().max() / expected.abs().max()) < 1e-10
    assert torch.allclose(both.layers[0].rotation, whole.layers[0].rotation, atol=1e-6)
    for other, message in (
        (projections(slice(0, 1), model | {"shape": shape | {"model_type": "opt"}}), "different models"),
        (projections(slice(0, 1), model | {"key_weights": [[0.5, 0.2, 0.3, 0.4]]}), "different weights"),
        (projections(slice(0, 1), basis="none"), "in the bases aqua and none"),
    ):
        with pytest.raises(AquaError, match=message):
            whole.merged(other)
