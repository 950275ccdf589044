"""The notebooks, from the first cell to the last, on a CPU: quickstart, then a fine-tune of what it made."""

import os
import pathlib

import pytest

nbclient = pytest.importorskip("nbclient")
nbformat = pytest.importorskip("nbformat")

HERE = pathlib.Path(__file__).parents[1]
FOLDER = HERE / "launch/colab"


def run(name, folder, **parameters):
    """Executes a notebook with other parameters, as on a machine that has lmtrain; returns what its cells printed."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    (cell,) = (c for c in notebook.cells if "parameters" in c.metadata.get("tags", ()))
    for key, value in parameters.items():
        assert f"{key} = " in cell.source or f", {key}" in cell.source or f"{key}," in cell.source, key
        cell.source += f"\n{key} = {value!r}"
    client = nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": folder}}
    )
    client.execute()
    return ["".join(o.get("text", "") for o in c.get("outputs", ())) for c in notebook.cells], notebook


@pytest.mark.slow
def test_the_notebooks_run_to_their_end(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(HERE), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    said, notebook = run("quickstart", tmp_path, ARGUMENTS="steps=20,sft=20,rl=2", WORKDIR="runs/quick")
    assert "rl 2/2" in "".join(said) and said[-1].count("model>") == 3
    drawn = [o for c in notebook.cells for o in c.get("outputs", ()) if "image/png" in o.get("data", {})]
    assert len(drawn) == 1, "the curves"
    from lmtrain import publish

    publish.export(str(tmp_path / "runs/quick"), str(tmp_path / "model"))
    said, _ = run("finetune", tmp_path, MODEL=str(tmp_path / "model"), STEPS=8, ROW_LENGTH=256, WORKDIR="runs/tuned")
    assert "lora 8/8" in "".join(said) and "model>" in said[-3]
    assert "model.safetensors" in said[-1] and (tmp_path / "runs/tuned-adapter/adapter_config.json").exists()


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda p: p.stem)
def test_a_notebook_is_kept_without_what_it_printed(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert not any(c.get("outputs") or c.get("execution_count") for c in notebook.cells)
