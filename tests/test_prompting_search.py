"""A search for ways of asking goes on after it was stopped, says at once what it cannot do, and reruns for a prompt file."""

import shutil

import pytest
import yaml
from conftest import ROOT

from llmops.adaptation import prompting
from llmops.adaptation.prompting import PromptingParams, run_prompting
from llmops.foundation.artifacts import seal
from llmops.foundation.project import ParamError
from llmops.tools import cli
from llmops.tools.pipeline import pipeline_files, read_stage_notebook, read_stages


def search(out, **changes) -> PromptingParams:
    told = {"questions": 4, "shots": [1], "picks": ["random"], "think_tokens": 3, "samples": 2, "max_new_tokens": 4}
    return PromptingParams(**told, resamples=199, wandb="disabled", out=str(out), **changes)


def finished(cfg: PromptingParams) -> str:
    "Run, seal, and give the digest."
    made = run_prompting(cfg)
    sealed = seal(made.work, cfg.out, "prompting", "llmops.adaptation.prompting", cfg, made.inputs, made.metrics)
    return sealed["digest"]


@pytest.fixture
def asked(monkeypatch):
    "The strategies that are asked; a number in `stops` breaks off before that many have been."
    names, stops = list[str](), list[int]()
    ask = prompting.try_strategy

    def watched(name, *args):
        if stops and len(names) == stops[0]:
            raise MemoryError("killed")
        names.append(name)
        return ask(name, *args)

    monkeypatch.setattr(prompting, "try_strategy", watched)
    return names, stops


def test_a_search_that_was_stopped_goes_on_and_makes_the_same_bytes(tmp_path, asked, capsys):
    names, stops = asked
    whole = finished(search(tmp_path / "whole"))
    every = list(names)
    assert len(every) == 5 and every[-1] == "constrained"
    names.clear()
    stops.append(2)
    with pytest.raises(MemoryError):
        run_prompting(search(tmp_path / "stopped"))
    assert names == every[:2] and not (tmp_path / "stopped").exists()
    names.clear()
    stops.clear()
    assert finished(search(tmp_path / "stopped")) == whole and names == every[2:]
    assert "going on with the search that was stopped" in capsys.readouterr().out
    for file in ("strategies.json", "predictions.jsonl", "scores.json"):
        assert (tmp_path / "stopped" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    stopped, undisturbed = ({p.name for p in (tmp_path / name).iterdir()} for name in ("stopped", "whole"))
    assert stopped == undisturbed


def test_another_search_does_not_go_on_with_it(tmp_path, asked, capsys):
    names, stops = asked
    stops.append(1)
    with pytest.raises(MemoryError):
        run_prompting(search(tmp_path / "out"))
    names.clear()
    with pytest.raises(MemoryError):
        run_prompting(search(tmp_path / "out", seed=7))
    assert names == ["zero-shot"] and "starting anew" in capsys.readouterr().out


@pytest.fixture
def project(tmp_path, monkeypatch):
    "A project with this one's parameters."
    shutil.copytree(ROOT / "params", tmp_path / "params")
    monkeypatch.setattr(cli, "find_project", lambda: tmp_path)
    started = []
    monkeypatch.setattr(cli, "run_goal", lambda stages, force=False: started.append(stages) or 1)
    return tmp_path, started


@pytest.mark.parametrize("task", ["closed_book", "summarization", "open_ended"])
def test_a_task_without_constrained_answers_is_refused_before_anything_runs(project, task, capsys):
    folder, started = project
    own = folder / "params/own"
    own.mkdir()
    (own / "data.yaml").write_text(yaml.safe_dump({"task": task}))
    (folder / "params/profile.yaml").write_text("params: params/own\n")
    assert cli.main(["prompting"]) == 1 and not started
    said = capsys.readouterr().err
    assert f"answers of {task}" in said and "few-shot" in said and "Nothing was run" in said
    stages = {stage.name for stage in read_stages(ROOT / "dvc.yaml")}
    assert {word.partition("@")[0] for word in cli.BEST_PROMPTS.split()} <= stages and cli.BEST_PROMPTS in said


@pytest.mark.parametrize("profile", ["params", "params/smoke", "params/classification"])
def test_the_projects_own_profiles_can_be_searched(project, profile):
    folder, started = project
    (folder / "params/profile.yaml").write_text(f"params: {profile}\n")
    cli.main(["prompting"])
    assert started == [("leaderboard-prompting",)]


def test_a_profile_that_turns_it_off_is_told_so(project):
    folder, _ = project
    (folder / "params/prompting.yaml").write_text("constrained: false\n")
    with pytest.raises(ParamError, match="constrained: it is false"):
        cli.check_prompting(folder)


def test_stages_that_read_prompt_files_depend_on_them():
    readers = 0
    for stage in [stage for file in pipeline_files(ROOT) for stage in read_stages(file)]:
        notebook = read_stage_notebook(ROOT, ROOT / stage.notebook)
        if "prompts" in notebook.parameters:
            assert "params/prompts" in stage.deps, f"{stage.name}: an edited prompt file would rerun nothing"
            readers += 1
    assert readers == 2
