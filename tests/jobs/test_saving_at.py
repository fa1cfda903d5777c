"""Checkpoints elsewhere than in the run's folder: another disk, or an object store (an emulator, started here)."""

import shutil
import socket
from dataclasses import replace

import jax
import numpy as np
import pytest
import tensorstore as ts
from etils import epath

import distill_jax.jobs.train as train
from distill_jax.cli.main import main
from distill_jax.jobs.run_recipe import run_recipe
from distill_jax.loading import load
from distill_jax.recipe import MeshShape, Recipe, Saving
from distill_jax.train.checkpoint import complete_steps
from tests.jobs.teachers import small_stage


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    return small_stage(tmp_path_factory.mktemp("world"))


@pytest.fixture
def gs(monkeypatch):
    for module in ("gcsfs", "google.cloud.storage"):
        pytest.importorskip(module)
    emulator = pytest.importorskip("gcp_storage_emulator.server")
    say_generations(emulator, monkeypatch)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    server = emulator.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket1")
    server.start()
    for name in ("STORAGE_EMULATOR_HOST", "TENSORSTORE_GCS_HTTP_URL"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
    monkeypatch.setenv("GOOGLE_CLOUD_PROJECT", "project")
    yield "gs://bucket1/runs"
    server.stop()


@pytest.fixture(params=["folder", "gs"])
def place(request, tmp_path):
    return str(tmp_path / "elsewhere") if request.param == "folder" else request.getfixturevalue("gs")


def say_generations(emulator, monkeypatch):
    """GCS answers a read with the object's generation too. The emulator does not, and then whatever is read back
    before it is written again (OCDBT's manifest, where two commits do not fall into one) cannot be written."""
    download = emulator.objects.download

    def saying(request, response, storage, *args, **kwargs):
        download(request, response, storage, *args, **kwargs)
        if response.status in (200, 206):
            name = request.params["bucket_name"], request.params["object_id"]
            response["x-goog-generation"] = storage.get_file_obj(*name)["generation"]

    monkeypatch.setattr(emulator.objects, "download", saying)
    for _, handlers in emulator.HANDLERS:
        for method, handler in handlers.items():
            if handler is download:
                monkeypatch.setitem(handlers, method, saying)


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def test_a_run_whose_folder_is_lost_goes_on_from_its_checkpoints(stage, place, tmp_path, capsys):
    saved = replace(stage, saving=Saving(steps=1, keep=2, at=place))
    recipe = Recipe(name="r", runs=str(tmp_path / "runs"), mesh=MeshShape(data=1, fsdp=-1), stages=(saved,))
    assert run_recipe(recipe)
    there = epath.Path(place) / "r" / "checkpoints"
    assert complete_steps(there) == [3, 4] and not (recipe.folder / "checkpoints").exists()
    _, whole = load(recipe.folder)
    same(load(f"{place}/r")[1], whole)  # the model's files are beside them
    shutil.rmtree(recipe.folder)
    (there / "4").rmtree()
    capsys.readouterr()
    assert run_recipe(recipe)
    assert "train: resumed at update 3 of 4" in capsys.readouterr().out
    assert complete_steps(there) == [3, 4]
    same(load(recipe.folder)[1], whole)


def test_the_emulator_takes_a_second_commit(gs):
    for value in (b"a", b"b"):
        kv = ts.KvStore.open({"driver": "ocdbt", "base": f"{gs}/kv/"}).result()
        kv["key"] = value
    assert kv["key"] == b"b"


def test_another_recipe_does_not_go_on_from_checkpoints_of_that_name(stage, tmp_path):
    saved = replace(stage, saving=Saving(at=str(tmp_path / "elsewhere")))
    assert run_recipe(Recipe(name="r", runs=str(tmp_path / "a"), mesh=MeshShape(data=1, fsdp=-1), stages=(saved,)))
    other = replace(saved, steps=5)
    with pytest.raises(ValueError, match="was written by another recipe"):
        run_recipe(Recipe(name="r", runs=str(tmp_path / "b"), mesh=MeshShape(data=1, fsdp=-1), stages=(other,)))


@pytest.mark.parametrize("setting,line", [
    ("saving.at=s3://bucket/runs", "Orbax cannot write them to s3://"),
    ("runs=gs://bucket/runs", "saving.at=gs://bucket/runs")])
def test_places_that_cannot_be_are_refused_in_one_line_before_anything_is_made(stage, tmp_path, capsys, setting, line):
    recipe = Recipe(name="r", runs=str(tmp_path / "runs"), stages=(stage,))
    (tmp_path / "r.yaml").write_text(recipe.to_yaml())
    setting = setting if setting.startswith("runs") else f"stages.0.{setting}"
    with pytest.raises(SystemExit) as end:
        main(["train", str(tmp_path / "r.yaml"), "--set", setting])
    assert end.value.code == 2
    said = capsys.readouterr().err.strip()
    assert line in said and len(said.splitlines()) == 1
    assert not (tmp_path / "runs").exists()


def test_a_place_that_cannot_be_written_is_said_in_one_line(stage, tmp_path):
    (tmp_path / "file").touch()
    saved = replace(stage, saving=Saving(at=str(tmp_path / "file")))
    with pytest.raises(OSError, match=r"cannot write to .*file/r: .*Not a directory") as said:
        run_recipe(Recipe(name="r", runs=str(tmp_path / "runs"), mesh=MeshShape(data=1, fsdp=-1), stages=(saved,)))
    assert "\n" not in str(said.value)


def test_what_is_missing_for_gs_is_said(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "_there", lambda module: module != "gcsfs")
    saved = replace(stage, saving=Saving(at="gs://bucket/runs"))
    with pytest.raises(ValueError, match=r"needs gcsfs: pip install 'distill_jax\[gcs\]'"):
        run_recipe(Recipe(name="r", runs=str(tmp_path / "runs"), mesh=MeshShape(data=1, fsdp=-1), stages=(saved,)))
