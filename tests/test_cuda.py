"""What is particular to a GPU or to torch.compile; most tests here need a CUDA device."""

import functools
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from test_train import columns, same_state
from torch import nn

import measure
import sample
import train
from train import PROCESSES, UNet

GPU = [*TINY, "--device", "cuda"]
FLOW = ["--process", "flow", "--conditional", "--flip"]
EAGER = ["--compile", "off", "--amp", "off"]
CUDA = torch.device("cuda")


def cuda(test):
    """Mark a test that needs a CUDA device; elsewhere it is skipped."""
    return pytest.mark.cuda(pytest.mark.skipif(
        not torch.cuda.is_available(), reason="needs a CUDA device")(test))


@pytest.fixture(autouse=True)
def settings_put_back():
    """Undo what train.setup_cuda sets, and what is compiled."""
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = True
    torch.compiler.reset()


def script(name, *argv):
    """The command that runs one of the scripts in a process of its own."""
    return [sys.executable, str(ROOT / name), *map(str, argv)]


def small_unet(device, classes=0):
    """A U-Net with attention whose output is not 0, on a device."""
    torch.manual_seed(0)
    net = UNet(16, (1, 2), 1, None, 32, classes, size=8)
    nn.init.normal_(net.conv_out.weight, std=0.1)
    return net.to(device, memory_format=torch.channels_last)


# --- On a GPU -------------------------------------------------------------------------------------


@cuda
@pytest.mark.parametrize("more", [[], [*FLOW, "--weighting", "sigmoid"], ["--amp", "fp16"]])
def test_every_stage(tmp_path, more):
    run = tmp_path / "r"
    commands = [("train.py", *GPU, *more, "--steps", 8, "--out", run),
                ("sample.py", run, "--num", 12, "--sampling-steps", 5),
                ("sample.py", run, "--num", 12, "--sampling-steps", 5, "--eta", 1),
                ("sample.py", run, "--num", 12, "--sampling-steps", 5, "--exact"),
                ("measure.py", run, "--features", "pixels")]
    for command in commands:
        subprocess.run(script(*command), check=True, cwd=tmp_path)
    assert (run / "metrics.csv").exists()
    losses = [float(row[f"{split}_loss"]) for row in columns(run) for split in ("train", "heldout")]
    assert len(losses) >= 4 and np.isfinite(losses).all()


@cuda
@pytest.mark.parametrize("more", [FLOW, EAGER, ["--amp", "fp16"]])
def test_resume_equals_uninterrupted_bit_for_bit(tmp_path, more):
    for name, steps in (("a", 12), ("b", 6), ("b", 12)):
        subprocess.run(script("train.py", *GPU, *more, "--steps", steps, "--out", tmp_path / name),
                       check=True)
    assert same_state(tmp_path / "a", tmp_path / "b")
    assert columns(tmp_path / "a") == columns(tmp_path / "b")


@cuda
def test_killed_it_ends_with_the_same_bits(tmp_path):
    options = [*GPU, *FLOW, "--steps", 300, "--save-minutes", 0, "--out"]
    with subprocess.Popen(script("train.py", *options, tmp_path / "b")) as process:
        while process.poll() is None and not (tmp_path / "b/last.pt").exists():
            time.sleep(0.01)
        time.sleep(0.1)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    assert torch.load(tmp_path / "b/last.pt", weights_only=True)["step"] < 300
    for name in "ab":
        subprocess.run(script("train.py", *options, tmp_path / name), check=True)
    assert same_state(tmp_path / "a", tmp_path / "b")
    assert columns(tmp_path / "a") == columns(tmp_path / "b")


@cuda
def test_two_runs_on_one_gpu_do_not_disturb_each_other(tmp_path):
    processes = [subprocess.Popen(script("train.py", *GPU, *FLOW, "--steps", 40, "--out",
                                         tmp_path / name)) for name in "ab"]
    assert [process.wait() for process in processes] == [0, 0]
    assert same_state(tmp_path / "a", tmp_path / "b")


@cuda
def test_compiled_and_eager_losses_agree_to_the_rounding_of_bf16(tmp_path):
    for choice in ("on", "off"):
        train.main([*GPU, *FLOW, "--steps", "32", "--lr", "1e-3", "--compile", choice,
                    "--out", str(tmp_path / choice)])
    for one, other in zip(*(columns(tmp_path / name) for name in ("on", "off")), strict=True):
        for key in ("train_loss", "heldout_loss"):
            assert float(one[key]) == pytest.approx(float(other[key]), rel=0.01), one["step"]


@cuda
def test_a_step_does_not_wait_for_the_device(tmp_path):
    args = train.parse([*GPU, *FLOW, "--compile", "off"])
    data = train.load_data("toy", 8, 8)
    net = train.build_net(vars(args), (8, 8, 3), 3)
    state = train.set_up(args, train.describe(args, data, net, 3), tmp_path, net, CUDA)
    splits, meter = train.data_on(CUDA, data, 3), train.Meter(CUDA)
    for step in range(1, 6):
        torch.cuda.set_sync_debug_mode("error" if step > 1 else "default")
        try:
            loss = train.training_loss(net, splits["train"], args, step)
            train.update(state, loss, step, args.ema)
            meter.record(step, loss)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()
    assert meter.loss == float(loss.detach()) and meter.bad_step == 0


@cuda
@measure.exact_float32()
def test_float32_on_the_gpu_agrees_with_the_cpu():
    process, found = PROCESSES["flow"], []
    x = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    images = ((x.permute(0, 2, 3, 1) + 1) * 127.5).to(torch.uint8)
    for device in ("cpu", "cuda"):
        net, labels = small_unet(device, classes=3), torch.arange(6, device=device) % 3
        t = torch.linspace(0.1, 0.9, 6, device=device)
        loss = train.diffusion_loss(net, process, x.to(device), t, x.flip(0).to(device), labels)
        loss.mean().backward()
        levels = train.evaluate(net, process, images.to(device), labels, 40, "off")[1]
        samples, _ = sample.sample(net, process, (3, 8, 8), [(0, i) for i in range(6)], 5, 1.0,
                                   labels=labels, device=device)
        found.append([loss.detach(), *(p.grad for p in net.parameters()),
                      torch.tensor(levels), samples])
    for on_cpu, on_gpu in zip(*found, strict=True):
        torch.testing.assert_close(on_gpu.cpu(), on_cpu, rtol=1e-3, atol=1e-4)


@cuda
def test_distances_and_metrics_equal_the_cpus():
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(300, 48, generator=g), torch.rand(300, 48, generator=g)
    y[:30] = x[:30] + 1e-4
    torch.set_float32_matmul_precision("high")          # as after training; must not matter
    for function in (measure.two_nearest, measure.sliced_wasserstein, measure.kid,
                     measure.precision_recall, measure.fid):
        results = function(x, y), function(x.cuda(), y.cuda())
        for one, other in zip(*(result if isinstance(result, tuple) else (result,)
                                for result in results), strict=True):
            torch.testing.assert_close(torch.as_tensor(other).cpu(), torch.as_tensor(one),
                                       rtol=1e-6, atol=1e-9)


@cuda
@pytest.mark.parametrize("data", ["toy", "digits"])         # in colour, grey
def test_all_snapshots_and_a_partial_batch_are_compiled_once(tmp_path, data):
    run = tmp_path / "r"
    train.main([*GPU, *EAGER, "--data", data, "--steps", "8", "--out", str(run)])
    torch.compiler.reset()
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    sample.main([str(run), "--num", "40", "--batch-size", "16", "--sampling-steps", "3"])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] - before == 1
    assert len(sample.read_samples(run / "samples/steps3/0000008.npz").images) == 40


@cuda
def test_out_of_gpu_memory_is_one_line_that_names_the_flag(tmp_path, refused):
    train.main([*GPU, *EAGER, "--steps", "4", "--out", str(tmp_path / "a")])
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(2**28 / torch.cuda.get_device_properties(0)
                                               .total_memory)
    try:
        refused(train.main, [*GPU, *EAGER, "--width", "64", "--batch", "8000", "--out",
                             tmp_path / "b"], "GPU memory", "--batch", code=1)
        refused(sample.main, [tmp_path / "a", *EAGER, "--num", "100000", "--batch-size", "100000"],
                "GPU memory", "--batch-size", code=1)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


# --- What a CPU can show --------------------------------------------------------------------------


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    getattr(torch, "AcceleratorError", RuntimeError)("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory"),
    MemoryError()])
def test_out_of_memory_is_one_line_and_no_damaged_file(tmp_path, monkeypatch, refused, sampled_run,
                                                       error):
    def fail(*args, **kwargs):
        raise error
    run = tmp_path / "r"
    train.main([*TINY, "--steps", "4", "--out", str(run)])
    before = (run / "last.pt").read_bytes()
    with monkeypatch.context() as patch:                # while resuming
        patch.setattr(torch.optim.Adam, "load_state_dict", fail)
        refused(train.main, [*TINY, "--steps", "8", "--out", run], "memory", "--batch", code=1)
    assert (run / "last.pt").read_bytes() == before
    monkeypatch.setattr(sample, "sample", fail)
    refused(sample.main, [run, "--num", "4"], "memory", "--batch-size", code=1)


@pytest.mark.parametrize("text", [
    "CUDA error: no kernel image is available for execution on the device",
    "The NVIDIA driver on your system is too old (found version 12010). Please update your driver"])
def test_a_card_that_torch_does_not_serve_is_one_line(tmp_path, monkeypatch, refused, text):
    def fail(*args, **kwargs):
        raise RuntimeError(text)
    monkeypatch.setattr(train, "set_up", fail)
    refused(train.main, [*TINY, "--steps", "4", "--out", tmp_path / "r"], "does not serve",
            "--device cpu", code=1)


def test_what_compiles_chooses_nothing_by_timing():
    from torch._inductor import config
    with config.patch(deterministic=False, dynamic_scale_rblock=True):
        train.setup_cuda()
        assert config.deterministic and not config.dynamic_scale_rblock


def test_many_networks_are_timed_in_one_process(monkeypatch):
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    with torch._dynamo.config.patch(recompile_limit=2):         # instead of 8
        for embed in ("8", "16", "24"):
            words = [*TINY, "--compile", "on", "--embed", embed, "--images", "64"]
            assert measure.time_steps(words, "cpu")[0] > 0


def test_a_fault_of_the_device_is_not_the_disks(tmp_path):
    def fail(file):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(torch.OutOfMemoryError):
        train.write_atomic(tmp_path / "f", fail)
    assert not any(tmp_path.iterdir())


def test_a_run_without_a_scaler_goes_on_with_one(tmp_path):
    train.main([*TINY, "--steps", "4", "--out", str(tmp_path)])     # as bf16: an empty state
    args = train.parse([*TINY, "--steps", "4"])
    net = train.build_net(vars(args), (8, 8, 3), 0)
    scaler = torch.amp.GradScaler("cpu", enabled=True)
    optimizer = torch.optim.Adam(net.parameters(), lr=args.lr, fused=True)
    state = train.State(net, net, optimizer, scaler, train.identity(train.read_run(tmp_path)))
    state.load(tmp_path, 4)
    assert state.step == 4 and scaler.get_scale() == 2**16


class Pixels(nn.Module):
    """A network small enough to be compiled in seconds."""
    classes = 0

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), train.RMSNorm(3)

    def forward(self, xt, t, labels=None):
        return self.conv(self.norm(xt)) * train.expand(t, xt)


def test_compiled_on_a_cpu_it_resumes_bit_for_bit(tmp_path, monkeypatch):
    def build(*args):
        torch.manual_seed(0)
        return Pixels()
    monkeypatch.setattr(train, "build_net", build)
    monkeypatch.setattr(sample, "build_net", build)
    for name, steps in (("a", "8"), ("b", "4"), ("b", "8")):
        train.main([*TINY, "--steps", steps, "--compile", "on", "--out", str(tmp_path / name)])
        torch.compiler.reset()
    assert same_state(tmp_path / "a", tmp_path / "b")
    train.main([*TINY, "--steps", "8", "--out", str(tmp_path / "eager")])
    for one, other in zip(columns(tmp_path / "a"), columns(tmp_path / "eager"), strict=True):
        assert float(one["train_loss"]) == pytest.approx(float(other["train_loss"]), rel=1e-5)


def test_no_compiler_is_one_line(tmp_path):
    smallest = ["--size", "4", "--width", "1", "--mults", "1", "--embed", "2"]
    done = subprocess.run(
        script("train.py", *TINY, *smallest, "--compile", "on", "--steps", 4, "--out",
               tmp_path / "r"), env=os.environ | {
            "CXX": "no-such-compiler", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
        check=False, capture_output=True, text=True)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error")]
    assert done.returncode == 1 and "Traceback" not in done.stderr and len(lines) == 1
    assert "no-such-compiler" in lines[0] and "--compile off" in lines[0]
