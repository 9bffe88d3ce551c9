"""The `mmdit` command as a user sees it: its output, its exit code, and a one-line message for every mistake."""

import sys

import helpers
import pytest
from PIL import Image

import mmdit_lib
from mmdit_lib import build, cli, convert, tiny
from mmdit_lib.cli.usage import UsageError, parsed


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder where the small model was converted and built in bfloat16, without a plan."""
    root = tmp_path_factory.mktemp("cli")
    convert(str(tiny.model_path()), str(root / "tllm_checkpoint"), dtype="bfloat16", progress=False)
    options = dict(plan=False, progress=False)
    build(str(root / "tllm_checkpoint"), str(root / "engine_outputs"), **options)
    build(str(root / "tllm_checkpoint"), str(root / "two_ranks"), cp_size=2, **options)
    build(str(root / "tllm_checkpoint"), str(root / "one_row"), max_batch_size=1, opt_text_tokens=154, **options)
    build(str(root / "tllm_checkpoint"), str(root / "three_rows"), max_batch_size=4, opt_batch_size=3, **options)
    return root


@pytest.fixture
def mmdit(work, monkeypatch, capsys):
    """Run the command in `work`: (exit code, stdout, stderr)."""
    monkeypatch.chdir(work)
    monkeypatch.setenv("COLUMNS", "80")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mmdit", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as exit:
            code, message = (exit.code, "") if isinstance(exit.code, int) else (1, str(exit.code))
        else:
            message = ""
        out, err = capsys.readouterr()
        return code, out, err + message

    return run


def test_parity_says_so_and_plots(mmdit, work):
    code, out, _ = mmdit(
        "parity", "--model_path", "tiny", "--resolution", "64", "--text_tokens", "77", "--plot", "e.png"
    )
    assert code == 0 and "all 277 values of 219 modules agree" in out.replace("\n", " ")
    assert Image.open(work / "e.png").width > 500
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("command", ["parity", "bench"])
def test_another_model_than_the_engines_is_refused(mmdit, tmp_path, command):
    helpers.random_transformer(helpers.MODELS["sd3-medium"]).save_pretrained(tmp_path)
    code, _, err = mmdit(command, "--model_path", tmp_path)
    assert code == 1 and "model and engine do not match: num_layers " in err and err.count("\n") <= 1


@pytest.mark.slow
def test_bench_beside_diffusers_in_half_precision(mmdit):
    sizes = ["--resolution", "64", "--text_tokens", "77", "--repeats", "1"]
    code, out, _ = mmdit("bench", "--model_path", "tiny", *sizes)
    assert code == 0 and "bfloat16" in out and "relative" in out and "1.00" in out
    code, out, _ = mmdit("bench", *sizes)
    assert code == 0 and "engine (pytorch)" in out and "relative" not in out


@pytest.mark.parametrize(
    ("folder", "sizes"),
    [("one_row", "batch 1, 154 text"), ("three_rows", "batch 3, 333 text"), ("engine_outputs", "batch 2, 333 text")],
)
def test_bench_defaults_to_sizes_of_the_engine(mmdit, folder, sizes):
    code, out, err = mmdit("bench", "--engine_dir", folder, "--resolution", "64", "--repeats", "1")
    assert code == 0 and sizes in " ".join(out.split()), err


@pytest.mark.slow
def test_bench_shows_and_plots_the_time_of_every_module(mmdit, work):
    sizes = ["--resolution", "64", "--text_tokens", "77", "--repeats", "1"]
    code, out, err = mmdit("bench", "--profile", "--plot", "t.png", *sizes)
    assert code == 0 and "transformer_blocks.*.attn" in out and "time_text_embed" in out and err == ""
    assert "the sum of layers timed one by one" in out
    assert Image.open(work / "t.png").width > 500 and "plot: t.png" in out
    assert max(map(len, out.splitlines())) <= 80


def test_inspect_knows_the_default_folder(mmdit):
    code, out, _ = mmdit("inspect")
    assert code == 0 and "4 heads of 48" in out


def test_export_and_onnx(mmdit, tmp_path):
    code, out, err = mmdit("export", "--output_dir", tmp_path / "transformer")
    assert code == 0 and "written" in out and "export:" in err
    names = {path.name for path in (tmp_path / "transformer").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}
    code, out, err = mmdit("onnx", "--output_dir", tmp_path / "onnx")
    assert code == 0 and "written" in out and "onnx:" in err
    assert {path.name for path in (tmp_path / "onnx").iterdir()} == {"model.onnx", "model.onnx.data"}


def test_generate_writes_a_picture(mmdit, work):
    steps = ["--num_inference_steps", "1", "--resolution", "64"]
    code, out, _ = mmdit("generate", "a red circle", *steps, "--output", "p.png")
    assert code == 0 and "image: p.png" in out
    assert Image.open(work / "p.png").size == (64, 64)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["generate", "x", "--output", "nowhere/p.png"], "folder nowhere does not exist"),
        (["generate", "x", "--output", "picture"], "such as picture.png"),
        (["generate", "x", "--num_inference_steps", "0"], "num_inference_steps 0: give 1 or more"),
        (["generate", "x", "--guidance_scale", "nan"], "guidance_scale nan: give a finite number"),
        (["generate", "x", "--heartbeat_timeout", "-1"], "heartbeat_timeout -1.0: give seconds, or 0 for never"),
        (["generate", "x", "--resolution", "512"], "outside the engine's 32 to 192 pixels"),
        (["generate", "x", "--engine_dir", "missing"], "missing is not an engine folder"),
        (["generate", "x", "--engine_dir", "two_ranks"], "start it with mpirun -n 2"),
        (["generate", "x", "--model_path", "no/such"], "no/such"),
        (["generate", "x", "--backend", "tensorrt"], "contains no plan"),
        (["parity", "--model_path", "tiny", "--plot", "no/e.png"], "folder no does not exist"),
        (["parity", "--model_path", "missing"], "missing"),
        (["bench", "--engine_dir", "two_ranks"], "start it with mpirun -n 2"),
        (["inspect", "missing"], "missing"),
        (["convert", "--model_path", "missing"], "missing does not exist"),
        (["build", "--checkpoint_dir", "missing"], "missing"),
        (["export", "--checkpoint_dir", "missing"], "missing is not a checkpoint folder"),
        (["export", "--output_dir", "two_ranks"], "contains something other than an exported transformer"),
        (["onnx", "--engine_dir", "two_ranks"], "ONNX has no collectives"),
        (["build", "--builder_optimization_level", "9"], "builder_optimization_level 9: use 0 to 5"),
        (["build", "--workspace", "lots"], "workspace 'lots': give a size such as 512MiB"),
        (["build", "--builder", "trtllm", "--cp_size", "2"], "cp_size: not an option of builder trtllm"),
        (["build", "--builder", "trtllm"], "trtllm-build is not on PATH; pip install tensorrt-llm==1.2.1"),
        (["bench", "--profile", "--compile"], "compiled blocks have no layers"),
        (["bench", "--repeats", "0"], "repeats 0: give 1 or more"),
        (["bench", "--plot", "no/e.png"], "folder no does not exist"),
        (["bench", "--plot", "/proc/e.png"], "/proc/e.png: no file can be written in /proc: No such file or directory"),
        (["parity", "--model_path", "tiny", "--plot", "/proc/e.png"], "no file can be written in /proc"),
        (["generate", "x", "--output", "/proc/p.png"], "no file can be written in /proc"),
        (["generate", "x", "--output", f"{'p' * 250}.png"], "File name too long"),
        (["generate", "x", "--device", "gpu"], "device 'gpu': use cpu, cuda or cuda:N"),
        (["generate", "x", "--device", "meta"], "device 'meta': use cpu, cuda or cuda:N"),
        (["generate", "x", "--device", "cpu", "--cuda_graph"], "cuda_graph needs a CUDA device, but this run uses cpu"),
    ],
    ids=lambda value: " ".join(value[:1] + value[-2:])[:60] if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line(mmdit, work, monkeypatch, arguments, words):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    before = sorted(work.iterdir())
    code, _, err = mmdit(*arguments)
    said = [line for line in err.splitlines() if "it/s" not in line]
    assert code == 1 and len(said) == 1 and said[0].startswith("mmdit: ") and words in said[0], err
    assert sorted(work.iterdir()) == before


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["convrt"], "no command 'convrt'; did you mean convert?"),
        (["zzz"], "no command 'zzz'; use doctor, convert, "),
        ([], "no command given; use doctor, convert"),
        (["--hlp"], "no command '--hlp'"),
        (["convert", "--modl_path", "tiny"], "unknown option --modl_path; did you mean --model-path?"),
        (["convert", "--model_path", "tiny", "--revison", "x"], "unknown option --revison; did you mean --revision?"),
        (["build", "--max_batch_siz", "3"], "unknown option --max_batch_siz; did you mean --max-batch-size?"),
        (["build", "--qqq"], "unknown option --qqq (see mmdit build --help)"),
        (["build", "extra"], "unrecognized options: extra"),
        (["parity"], "mmdit: parity needs --model_path (see mmdit parity --help)"),
        (["convert"], "mmdit: convert needs --model_path (see mmdit convert --help)"),
        (["generate"], "mmdit: generate needs PROMPT (see mmdit generate --help)"),
        (["generate", "a", "red", "circle"], "unrecognized options: red, circle; put the prompt in quotes (see"),
        (["convert", "--model_path", "tiny", "--dtype", "fp16"], "'bfloat16'); did you mean float16? (see"),
        (["convert", "--model_path", "tiny", "--dtype", "bf16"], "did you mean bfloat16?"),
        (["convert", "--model_path"], "missing value for argument '--model-path'"),
        (["convert", "--model_path", "tiny", "--dtype", "int9"], "invalid choice 'int9' for argument '--dtype'"),
        (["convert", "--model_path", "tiny", "--tp_size", "two"], "error parsing --tp-size: invalid literal for int()"),
        (["generate", "x", "--guidance_scale", "much"], "error parsing --guidance-scale"),
        (["generate", "x", "--backend", "onnx"], "invalid choice 'onnx' for argument '--backend'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_a_mistake_of_usage_is_one_line_with_exit_code_2(mmdit, arguments, words):
    code, out, err = mmdit(*arguments)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("mmdit: ") and words in err, err


def test_a_mistake_of_usage_on_a_terminal_is_the_same_line(mmdit, monkeypatch):
    mistakes = ["convert", "--modl_path", "tiny"], ["generate", "x", "--heartbeat_timeout", "soon"], ["convert"]
    plain = [mmdit(*mistake) for mistake in mistakes]
    monkeypatch.setattr("tyro._fmtlib._FORCE_ANSI", True)  # as on a terminal, where tyro prints in color
    assert [mmdit(*mistake) for mistake in mistakes] == plain


def test_all_missing_options_are_named():
    def command(first_size: int, *, second_size: int, third: int = 3):
        """A command. --fourth is no option."""

    with pytest.raises(
        UsageError, match=r"^command needs --first_size and --second_size \(see mmdit command --help\)$"
    ):
        parsed(command, "mmdit command", [])


def test_version(mmdit):
    assert mmdit("--version") == (0, f"mmdit {mmdit_lib.__version__}\n", "")


@pytest.mark.parametrize("arguments", [["--help"], ["build", "--help"]])
def test_help_is_tyros(mmdit, arguments):
    code, out, err = mmdit(*arguments)
    assert code == 0 and err == "" and out.startswith("usage: mmdit") and len(out.splitlines()) > 10


def test_demo_in_the_home_folder(mmdit, tmp_path, monkeypatch):
    """All its files are in one place; this stops after the first stage's arguments are known."""

    def stop(model, output_dir, **options):
        raise ValueError(f"convert to {output_dir}")

    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("mmdit_lib.tiny.demo.convert", stop)
    code, _, err = mmdit("demo", "--output_dir=~/demo")
    assert code == 1 and err.strip() == f"mmdit: convert to {tmp_path / 'demo' / 'tllm_checkpoint'}"


def test_more_ranks_than_the_engine_is_for(mmdit, monkeypatch):
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    monkeypatch.setattr("mmdit_lib.parallel.faults.end_all", lambda error: sys.exit(str(error)))
    code, _, err = mmdit("generate", "x")
    assert code == 1 and "is for one process, and 2 ranks are running: start it without mpirun" in err
