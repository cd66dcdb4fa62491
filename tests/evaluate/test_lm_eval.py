# SPDX-License-Identifier: Apache-2.0
"""AQUA as a model type of lm-evaluation-harness, on tasks of our own in local files."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch

import aqua_attention as aqua
from aqua_attention.cli import main as cli
from conftest import calibrated, make_llama, subject_of

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is an extra")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from aqua_attention.evaluate.lm_eval import AquaLM  # noqa: E402
from aqua_attention.evaluate.tasks.answers import answer_items  # noqa: E402
from aqua_attention.evaluate.tasks.formats import ChoiceItem, load_task  # noqa: E402
from aqua_attention.evaluate.tasks.run import evaluate_tasks  # noqa: E402

CHOICE = """
task: tiny_choice
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
metric_list:
  - metric: acc
  - metric: acc_norm
"""
WRITTEN = """
task: tiny_written
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{choices[0]}}"
generation_kwargs:
  until: ["w5"]
  max_gen_toks: 8
metric_list:
  - metric: exact_match
"""


def words(first, count):
    return " ".join(f"w{(11 * number + first) % 90}" for number in range(count))


ROWS = [
    {"question": words(n, 20 + n % 3), "choices": [words(n + 40, 2), words(n + 7, 3)], "gold": n % 2} for n in range(16)
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory, word_tokenizer):
    """The tiny Llama with its tokenizer and projections, and the two tasks, as files."""
    folder = tmp_path_factory.mktemp("lm-eval")
    model = make_llama()
    model.save_pretrained(folder / "model")
    word_tokenizer.save_pretrained(folder / "model")
    settings = json.loads((folder / "model" / "tokenizer_config.json").read_text())
    (folder / "model" / "tokenizer_config.json").write_text(json.dumps(settings | {"eos_token": "<s>"}))
    calibrated(model).save(folder / "tiny.safetensors")
    (folder / "tasks").mkdir()
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    files = {"data_files": {"test": str(folder / "rows.jsonl")}, "cache_dir": str(folder / "cache")}
    source = f"\ndataset_path: json\ntest_split: test\ndataset_kwargs: {json.dumps(files)}\n"
    for name, text in (("choice", CHOICE), ("written", WRITTEN)):
        (folder / "tasks" / f"{name}.yaml").write_text(text + source)
    return folder


@pytest.fixture(scope="module")
def evaluated(folder):
    """Figures and answers of both tasks by lm-eval, dense (`hf`) and under AQUA."""

    def run(model, **arguments):
        return lm_eval.simple_evaluate(
            model=model,
            model_args={"pretrained": str(folder / "model"), "dtype": "float32"} | arguments,
            tasks=["tiny_choice", "tiny_written"],
            task_manager=TaskManager(include_path=str(folder / "tasks"), include_defaults=False),
            batch_size=4,
            device="cpu",
            bootstrap_iters=0,
        )

    given = {"projections": str(folder / "tiny.safetensors"), "preset": "paper"}
    runs = {"dense": run("hf")} | {ratio: run("aqua", **given, k_ratio=ratio) for ratio in (1, 0.25)}
    return {name: (found["results"], found["samples"]) for name, found in runs.items()}


def log_likelihoods(samples):
    ordered = sorted(samples["tiny_choice"], key=lambda sample: sample["doc_id"])
    return torch.tensor([[float(answer[0][0]) for answer in sample["resps"]] for sample in ordered])


def texts(samples):
    ordered = sorted(samples["tiny_written"], key=lambda sample: sample["doc_id"])
    return [sample["resps"][0][0] for sample in ordered]


def test_at_k_ratio_1_the_harness_finds_the_dense_scores(evaluated):
    (dense, dense_samples), (full, samples) = evaluated["dense"], evaluated[1]
    for task in ("tiny_choice", "tiny_written"):
        names = [name for name, value in dense[task].items() if name.endswith(",none") and isinstance(value, float)]
        assert names
        assert [full[task][name] for name in names] == [dense[task][name] for name in names]
    assert torch.allclose(log_likelihoods(samples), log_likelihoods(dense_samples), atol=1e-3)
    assert texts(samples) == texts(dense_samples)
    assert any(texts(samples)), "something was written"


def test_a_quarter_of_the_dimensions_changes_log_likelihoods_and_texts(evaluated):
    (_, dense), (_, quarter) = evaluated["dense"], evaluated[0.25]
    assert (log_likelihoods(quarter) - log_likelihoods(dense)).abs().max() > 0.1
    assert texts(quarter) != texts(dense)


def test_our_own_log_likelihoods_are_those_of_the_harness(evaluated, llama, word_tokenizer):
    model, projections = llama
    items = [ChoiceItem((row["question"],) * 2, tuple(f" {text}" for text in row["choices"]), 0, "") for row in ROWS]
    runs = [None, aqua.apply(model, projections, aqua.AquaConfig.paper(k_ratio=0.25))]
    for name, found in zip(("dense", 0.25), answer_items(model, word_tokenizer, items, runs), strict=True):
        assert torch.allclose(torch.tensor(found), log_likelihoods(evaluated[name][1]), atol=1e-3)


HARNESS = {
    "hellaswag": "hellaswag/hellaswag.yaml",
    "winogrande": "winogrande/default.yaml",
    "arc_easy": "arc/arc_easy.yaml",
    "truthfulqa": "truthfulqa/truthfulqa_mc1.yaml",
    "mmlu": "mmlu/default/mmlu_abstract_algebra.yaml",
    "gsm8k": "gsm8k/gsm8k.yaml",
}
"""Our name of a task, and the harness's definition of it."""


def rows_of_the_hub(name):
    """A few questions in a data set's own format, of words that the tiny model knows."""
    for n in range(6):
        choices = [words(n + 13 * place, 2 + (n + place) % 3) for place in range(4)]
        yield {
            "hellaswag": {
                "activity_label": words(n, 2),
                "ctx_a": words(n + 5, 9) + " [title] w3",
                "ctx_b": "",
                "endings": choices,
                "label": str(n % 4),
            },
            "winogrande": {
                "sentence": f"{words(n, 6)} _ {words(n + 9, 4)}.",
                "option1": "w8",
                "option2": "w9 w1",
                "answer": str(1 + n % 2),
            },
            "arc_easy": {
                "question": words(n, 7),
                "choices": {"text": choices, "label": list("ABCD")},
                "answerKey": "ABCD"[n % 4],
            },
            "truthfulqa": {"question": words(n, 5)}
            | {f"mc{kind}_targets": {"choices": choices, "labels": [1, 0, 0, 0]} for kind in (1, 2)},
            "mmlu": {"question": words(n, 7), "choices": choices, "answer": n % 4, "subject": "abstract_algebra"},
            "gsm8k": {"question": words(n, 7), "answer": f"w3 #### {n}"},
        }[name]


@pytest.fixture(scope="module")
def by_the_harness(folder):
    """Figures and samples of the harness's own tasks, dense, and their files of questions."""
    tasks, definitions = folder / "harness", Path(lm_eval.__file__).parent / "tasks"
    tasks.mkdir()
    for name, definition in HARNESS.items():
        file = tasks / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows_of_the_hub(name)))
        files = {split: str(file) for split in ("train", "dev", "validation", "test")}
        source = {"data_files": files, "cache_dir": str(folder / "cache")}
        (tasks / f"{name}.yaml").write_text(
            f"include: {definitions / definition}\ntask: our_{name}\ndataset_path: json\ndataset_name: null\n"
            f"dataset_kwargs: {json.dumps(source)}\n"
            + ("generation_kwargs:\n  until: ['Question:']\n  max_gen_toks: 4\n" if name == "gsm8k" else "")
        )
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args={"pretrained": str(folder / "model"), "dtype": "float32"},
        tasks=[f"our_{name}" for name in HARNESS],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        num_fewshot=0,
        device="cpu",
        bootstrap_iters=0,
    )
    return tasks, found


@pytest.mark.parametrize("name", sorted(HARNESS))
def test_prompts_and_figures_are_those_of_the_harness(by_the_harness, name, llama, word_tokenizer):
    tasks, found = by_the_harness
    ours = load_task(name, tasks / f"{name}.jsonl", few_shot=0)
    # GSM8K's are there once for each way to find the number in an answer.
    samples = {sample["doc_id"]: sample for sample in found["samples"][f"our_{name}"]}
    assert len(samples) == len(ours.items) == 6
    for place, item in enumerate(ours.items):
        prompts = [tuple(arguments) for arguments in samples[place]["arguments"]]
        if name == "gsm8k":
            assert prompts[0][0] == item.prompt
        elif name == "truthfulqa":  # theirs has six questions before it
            assert all(prompt.endswith(f"\n\n{item.contexts[0]}") for prompt, _ in prompts)
            assert tuple(answer for _, answer in prompts) == item.continuations
        else:
            assert prompts == list(zip(item.contexts, item.continuations, strict=True))
    if name not in ("gsm8k", "truthfulqa"):
        dense = evaluate_tasks(subject_of(llama[0], llama[1], word_tokenizer), [], [ours])["dense"]
        for figure in dense:
            assert figure["value"] == pytest.approx(found["results"][f"our_{name}"][f"{figure['metric']},none"])


def test_the_settings_arrive_and_aqua_stays_attached(folder):
    model = AquaLM(
        pretrained=str(folder / "model"),
        projections=str(folder / "tiny.safetensors"),
        basis="none",
        device="cpu",
        **{"k_ratio": 0.5, "selection": "weighted", "share": "group", "sink": 2, "recent": 3, "bits": 8},
    )
    expected = aqua.AquaConfig(0.5, selection="weighted", share="group", sink=2, recent=3, bits=8)
    assert model.attachment.config == expected
    assert model.attachment.projections.basis == "none"
    assert model.model.config._attn_implementation.startswith("aqua")
    request = Instance("loglikelihood", {}, (words(0, 9), " w1"), 0)
    assert model.loglikelihood([request], disable_tqdm=True)[0][0] < 0
    model.attachment.detach()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, aqua.AquaConfig()),
        ({"preset": "fast", "sink": 1}, aqua.AquaConfig(k_ratio=0.5, sink=1)),
        ({"preset": "paper"}, aqua.AquaConfig.paper()),
    ],
)
def test_a_preset_is_an_argument_and_the_others_override_it(folder, arguments, expected):
    given = {"pretrained": str(folder / "model"), "projections": str(folder / "tiny.safetensors"), "device": "cpu"}
    model = AquaLM(**given, **arguments)
    model.attachment.detach()
    assert model.attachment.config == expected


def test_wrong_arguments_are_refused(folder):
    given = {"pretrained": str(folder / "model"), "projections": str(folder / "tiny.safetensors"), "device": "cpu"}
    with pytest.raises(aqua.AquaError, match="model_args has no projections"):
        AquaLM(given["pretrained"])
    with pytest.raises(aqua.AquaError, match="preset is 'best': it must be one of accurate"):
        AquaLM(**given, preset="best")
    with pytest.raises(aqua.AquaError, match="k_ratio is 2"):
        AquaLM(**given, k_ratio=2)
    with pytest.raises(aqua.AquaError, match="no such projections file"):
        AquaLM(**given | {"projections": str(folder / "none.safetensors")})
    model = AquaLM(**given, h2o_ratio=0.5)
    with pytest.raises(aqua.AquaError, match="h2o_ratio acts on a cache"):
        model.loglikelihood([Instance("loglikelihood", {}, (words(0, 9), " w1"), 0)], disable_tqdm=True)


def run_command(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["aqua", "lm-eval", *map(str, args)])
    try:
        cli.main()
        code = 0
    except SystemExit as leaving:
        code = leaving.code or 0
    return code, *capsys.readouterr()


def test_the_command_passes_its_arguments_on(monkeypatch, capsys, folder, tmp_path):
    """The local model lies in a folder whose name has no comma: lm-eval splits its model_args there."""
    arguments = f"pretrained={folder / 'model'},projections={folder / 'tiny.safetensors'},k_ratio=0.5,dtype=float32"
    code, out, err = run_command(
        *(monkeypatch, capsys, "--model", "aqua", "--model_args", arguments, "--tasks", "tiny_choice"),
        *("--include_path", folder / "tasks", "--device", "cpu", "--limit", 4, "--output_path", tmp_path / "out"),
    )
    assert code == 0, err
    assert "tiny_choice" in out
    (written,) = (tmp_path / "out").rglob("results_*.json")
    assert 0 <= json.loads(written.read_text())["results"]["tiny_choice"]["acc,none"] <= 1


def test_mistakes_are_one_line(monkeypatch, capsys, folder):
    code, _, err = run_command(
        *(monkeypatch, capsys, "run", "--model", "aqua", "--model_args", f"pretrained={folder / 'model'}"),
        *("--tasks", "tiny_choice", "--include_path", folder / "tasks", "--device", "cpu"),
    )
    assert code == 2
    assert err.splitlines()[-1].startswith("error: model_args has no projections")
    code, _, err = run_command(monkeypatch, capsys, "run", "--model", "aqua", "--tasks", "no_such_task")
    assert code == 2
    assert "no_such_task" in err.splitlines()[-1]


def test_both_helps_can_be_had(monkeypatch, capsys):
    code, out, _ = run_command(monkeypatch, capsys, "--help")
    assert (code, "--model aqua" in out) == (0, True)
    code, out, _ = run_command(monkeypatch, capsys, "run", "--help")
    assert (code, "--num_fewshot" in out) == (0, True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"kratio": 0.5}, "model_args has kratio, which .* knows: did you mean 'k_ratio'?"),
        ({"colour": "red"}, "model_args has colour, .*: AQUA's own are k_ratio, s_ratio, "),
        ({"pretrained": "nobody/nothing"}, "model 'nobody/nothing' cannot be loaded .*: the hub cannot be reached"),
        ({"pretrained": "/no/model"}, "model '/no/model' cannot be loaded .*: check the name"),
        ({"dtype": "int3"}, "model '.*' cannot be loaded .*int3"),
    ],
)
def test_a_mistake_in_model_args_is_ours_to_say(arguments, words, folder):
    given = {"pretrained": str(folder / "model"), "projections": str(folder / "tiny.safetensors")}
    with pytest.raises(aqua.AquaError, match=words):
        AquaLM(**given | arguments)


@pytest.mark.parametrize("error", [TypeError("'<=' of int and 'abc'"), ValueError("no task abc")])
def test_what_the_harness_raises_for_a_value_is_one_line(error, monkeypatch, capsys):
    import lm_eval.__main__ as harness

    def refuse():
        raise error

    monkeypatch.setattr(harness, "cli_evaluate", refuse)
    monkeypatch.setattr(sys, "argv", ["aqua", "lm-eval", "run"])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert leaving.value.code == 2
    assert line == f"error: lm-eval refuses this ({error}): see `aqua lm-eval run --help`"
