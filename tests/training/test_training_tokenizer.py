"""Training the image tokenizer: single steps, whole runs, and runs that are killed in separate processes."""

import json
import math
import os
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from einops import rearrange
from PIL import Image
from safetensors.numpy import load_file
from safetensors.torch import save_file

from cogvideo.bundle.model import CogVideo, update
from cogvideo.cli import main
from cogvideo.config import CogVideoConfig, LayoutConfig, TransformerConfig, UpscalerConfig
from cogvideo.data import frame_store
from cogvideo.data.frame_store import StoreSettings
from cogvideo.data.frames import FrameSettings
from cogvideo.data.sources import SourceOptions
from cogvideo.evaluation.networks import cache
from cogvideo.media.metrics import psnr, ssim
from cogvideo.models.autoencoder import Autoencoder, to_frames
from cogvideo.models.perceptual import Lpips, file_name
from cogvideo.models.transformer import Base
from cogvideo.training.checkpoints import Checkpoints, restore, training_state
from cogvideo.training.objectives.task import BatchLosses
from cogvideo.training.objectives.tokenizer import FrameStream, TokenizerObjective, TokenizerSettings, batch_places
from cogvideo.training.session import LoggingConfig
from cogvideo.training.step import Trainer
from cogvideo.training.tokenizer import evaluate
from cogvideo.training.tokenizer import train_tokenizer as tokenizer
from killing import full_disk, kill, paused
from workshop import small_autoencoder

SIDE = 24
SIZES = replace(small_autoencoder(40), nominal_resolution=32, attention_resolution=8)
SMALL = CogVideoConfig(
    transformer=TransformerConfig(1, 8, 1, 64, 40, 50, 40, 40),
    layout=LayoutConfig(grid=6, text_slots=4, image_text_slots=4, frame_position=4),
    interpolation=replace(CogVideoConfig().interpolation, window=2),
    upscaler=UpscalerConfig(text_slots=4, low_position=4),
    autoencoder=SIZES,
)
QUICK = TokenizerSettings(
    steps=8, batch=2, warmup=1, plain_steps=2, start_vectors=2, adversary_start=4, adversary_width=4
)
FEW = StoreSettings(num_frames=12, num_held_out=4, frames_per_clip=4, clips=FrameSettings(min_frames=1))
SIZED = replace(FEW, clips=FrameSettings(min_frames=1, size=SIDE))
OPTIONS = SourceOptions(images=True)


def pictures(count, seed=0):
    """Frames with large shapes: each has a smooth gradient and a square."""
    generator = np.random.default_rng(seed)
    ramps = np.linspace(0, 255, SIDE)[None, :, None, None] * generator.random((count, 1, 1, 3))
    frames = np.broadcast_to(ramps, (count, SIDE, SIDE, 3)).copy()
    for frame in frames:
        top, left = generator.integers(0, SIDE // 2, 2)
        frame[top : top + 10, left : left + 10] = generator.integers(0, 256, 3)
    return frames.astype(np.uint8)


def trainer(frames, settings=QUICK, sizes=SIZES, seed=0, lpips=None):
    stream = FrameStream(frames, settings.batch, seed)
    return Trainer(TokenizerObjective(sizes, settings, seed, stream, lpips), settings)


def make_step(model, number):
    """Run a step; returns its metrics."""
    model.step(number, model.objective.stream[number])
    return model.figures(number + 1).parts


def weights(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# One step


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_a_tiny_set_is_learnt(optimizer):
    """Catches errors in losses, gradients or the codebook: eight frames would not be reconstructed from their codes."""
    settings = replace(QUICK, steps=150, batch=8, learning_rate=4e-3, warmup=10, plain_steps=20, adversary_weight=0)
    frames = pictures(8)
    model = trainer(frames, replace(settings, optimizer=optimizer))
    before = evaluate(model.objective.model, frames, 8)
    for step in range(settings.steps):
        measured = make_step(model, step)
    after = evaluate(model.objective.model, frames, 8)
    assert after.psnr > before.psnr + 10
    assert after.psnr > 20
    assert after.ssim > 0.6
    assert after.code_usage > 0.6
    assert measured.keys() == {"pixels", "edges", "commitment", "psnr", "restarted"}


def test_the_adversary_begins_at_its_step_and_changes_weights():
    """The adversary must not run early; once it starts, it must learn, and its gradient must reach the decoder."""
    frames = pictures(8)
    with_it, without = trainer(frames), trainer(frames, replace(QUICK, adversary_weight=0))
    for step in range(QUICK.steps):
        judge = weights(with_it.objective.discriminator)
        measured, plain = make_step(with_it, step), make_step(without, step)
        started = step >= QUICK.adversary_start
        assert ("adversary" in measured, "discriminator" in measured) == (started, started)
        assert "adversary" not in plain
        now = with_it.objective.discriminator.state_dict()
        assert any(not torch.equal(judge[name], now[name]) for name in judge) == started
        same = torch.equal(*(each.objective.model.decoders[0].conv_out.weight for each in (with_it, without)))
        assert same == (not started)


@pytest.mark.parametrize("optimizer", ["adam", "muon"])
def test_one_backward_pass_is_that_of_two(optimizer):
    """The adversary and the autoencoder must each learn only from their own losses, as in two separate passes."""
    settings, frames = replace(QUICK, adversary_start=0, plain_steps=0, optimizer=optimizer), pictures(8)
    model, plain = trainer(frames, settings), trainer(frames, settings)
    objective = plain.objective
    generating, *_, judging = objective.optimizers(settings)
    for step in range(1 if optimizer == "muon" else 3):
        model.step(step, model.objective.stream[step])
        objective.begin(step)
        batch = to_frames(objective.stream[step])
        made, vectors, codes, commitment = objective._pass(batch, 4, True)
        losses = objective._image_losses(made, batch)
        whole = sum(losses.values()) + objective._adversary_loss(made, sum(losses.values()), 4) + 0.25 * commitment
        whole.backward()
        torch.nn.utils.clip_grad_norm_(objective.model.parameters(), 1.0)
        assert all(each.grad is None for each in objective.discriminator.parameters())
        generating.param_groups[0]["lr"] = judging.param_groups[0]["lr"] = settings.rate_at(step)
        generating.step()
        objective.model.zero_grad()
        objective._discriminator_loss(made.detach(), batch).backward()
        judging.step()
        objective.discriminator.zero_grad()
        objective._move_codebook(vectors, codes)
    for part in ("discriminator", "codebook"):
        ours, theirs = (weights(getattr(each.objective, part)) for each in (model, plain))
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])
    bias, expected = (each.objective.model.project.bias for each in (model, plain))
    torch.testing.assert_close(bias, expected)


def test_the_codebook_starts_after_the_plain_steps():
    """Catches k-means of untrained vectors, or no codes at all, which the loss would not reveal."""
    model = trainer(pictures(8))
    rows = model.objective.model.codebook.embedding
    first = rows.clone()
    for step in range(QUICK.plain_steps):
        assert "commitment" not in make_step(model, step)
        assert torch.equal(rows, first)
    measured = make_step(model, QUICK.plain_steps)
    assert not torch.equal(rows, first)
    assert 0 < measured["commitment"] < 1


def test_commitment_is_the_distance_from_the_rows():
    """Guards the commitment loss: the mean squared distance from the codebook rows, times its weight."""
    frames = pictures(8)
    model = trainer(frames)
    for step in range(3):
        make_step(model, step)
    autoencoder = model.objective.model
    batch = to_frames(torch.from_numpy(frames[batch_places(3, 2, 8, 0).numpy()]))
    with torch.no_grad():
        features = autoencoder.features(batch, 4)
        rows = autoencoder.codebook.lookup(autoencoder.encode(batch))
        expected = (rearrange(features, "batch dim rows columns -> batch rows columns dim") - rows).square().mean()
    assert make_step(model, 3)["commitment"] == pytest.approx(0.25 * expected.item(), rel=1e-4)


def test_lpips_is_used_where_it_is_given():
    """Catches a perceptual loss that is loaded but not used."""
    with torch.device("meta"):
        network = Lpips()
    network = network.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for parameter in network.parameters():
        parameter.normal_(0, 0.05, generator=generator)
    frames = pictures(4)
    assert make_step(trainer(frames, lpips=network), 0)["perceptual"] != 0
    assert "perceptual" not in make_step(trainer(frames, replace(QUICK, perceptual_weight=0), lpips=network), 0)


def test_rates_take_turns():
    """Catches a decoder that never trains and would be delivered with its initial weights."""
    model = trainer(pictures(4), sizes=replace(SIZES, decoder_multipliers=((1, 1, 2), (1, 2))))
    decoders = model.objective.model.decoders
    for step in range(4):
        before = [weights(decoder) for decoder in decoders]
        make_step(model, step)
        moved = [
            any(not torch.equal(old[name], now) for name, now in decoder.state_dict().items())
            for old, decoder in zip(before, decoders, strict=True)
        ]
        assert moved[step % 2]


def test_bfloat16_learns_alike():
    """Guards bfloat16: weights and codebook stay in float32, and the loss stays close."""
    models = [trainer(pictures(8), replace(QUICK, precision=precision)) for precision in ("float32", "bfloat16")]
    for step in range(6):
        losses = [make_step(model, step) for model in models]
    assert losses[1]["pixels"] == pytest.approx(losses[0]["pixels"], rel=0.1)
    assert {tensor.dtype for tensor in models[1].objective.model.state_dict().values()} == {torch.float32}


def test_a_step_depends_on_its_number_alone():
    """Guards resuming: nothing may come from the global random generator."""
    frames, results = pictures(8), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model = trainer(frames, replace(QUICK, restart_below=0.9))  # so that codes are restarted
        for step in range(6):
            make_step(model, step)
        results.append(weights(model.objective))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    other = trainer(frames, seed=1)
    make_step(other, 0)
    assert not torch.equal(other.objective.model.encoder.conv_in.weight, results[0]["model.encoder.conv_in.weight"])


@pytest.mark.parametrize(("at", "optimizer"), [(1, "adam"), (2, "adam"), (3, "muon"), (5, "adam")])
def test_a_state_is_all_that_counts(at, optimizer, tmp_path):
    """Guards the steps after a checkpoint, which would change if it lacked averages, moments or the adversary, or added
    moments to an optimizer that has not started."""
    settings, frames = replace(QUICK, optimizer=optimizer), pictures(8)
    sizes = replace(SIZES, decoder_multipliers=((1, 1, 2), (1, 2)))
    whole, first, second = (trainer(frames, settings, sizes) for _ in range(3))
    checkpoints = Checkpoints(tmp_path)
    for step in range(7):
        make_step(whole, step)
    for step in range(at):
        make_step(first, step)
    checkpoints.save(at, training_state(first.module, first.optimizers, None))
    blank = training_state(second.module, second.optimizers, None)
    restore(second.module, second.optimizers, checkpoints.load(at, blank))
    for step in range(at, 7):
        make_step(first, step)
        make_step(second, step)
    expected = weights(whole.objective)
    for model in (first, second):
        got = weights(model.objective)
        assert all(torch.equal(expected[name], got[name]) for name in expected)


@pytest.mark.parametrize(("num_frames", "batch"), [(10, 3), (4, 4), (3, 8)])
def test_every_frame_comes_once_an_epoch(num_frames, batch):
    """Catches frames that repeat within an epoch at the cost of others, and epochs that all have the same order."""
    steps = 3 * num_frames
    drawn = torch.cat([batch_places(step, batch, num_frames, seed=5) for step in range(steps)]).tolist()
    epochs = [tuple(drawn[start : start + num_frames]) for start in range(0, len(drawn), num_frames)]
    assert all(sorted(epoch) == list(range(num_frames)) for epoch in epochs)
    assert len(set(epochs)) > 1


def test_phases_follow_the_number_of_steps():
    """Guards short runs: without codes or the adversary, they would follow a different recipe from long ones."""
    for steps, codes_from in ((3, 0), (100, 25), (20_000, 1000)):
        settings = TokenizerSettings(steps=steps)
        assert settings.codes_from == codes_from
        assert [settings.has_adversary(step) for step in (steps // 2 - 1, steps // 2)] == [False, True]
    given = replace(settings, plain_steps=0, adversary_start=7)
    assert (given.codes_from, given.has_adversary(6), given.has_adversary(7)) == (0, False, True)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps is 0, expected a positive number"),
        ({"batch": -1}, "batch is -1"),
        ({"warmup": -1}, "warmup is -1, expected 0 or more"),
        ({"codebook_decay": 1.0}, "codebook_decay is 1.0, expected a number between 0 and 1"),
        ({"restart_below": 0.0}, "restart_below is 0.0"),
        ({"adversary_weight": -0.1}, "adversary_weight is -0.1"),
        ({"steps": 5, "plain_steps": 5}, "plain_steps is 5, expected less than the 5 steps"),
        ({"learning_rate": math.nan}, "learning_rate is nan"),
    ],
)
def test_wrong_settings_are_refused(wrong, message):
    """Catches bad settings at once; otherwise they would surface after hours, or never."""
    with pytest.raises(ValueError, match=message):
        TokenizerSettings(**wrong)


# Metrics


def test_quality_is_that_of_each_frame():
    """Guards the metrics: batches of unequal size must not weigh differently, and frames are clamped as displayed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Autoencoder(SIZES)
    frames = pictures(5)
    shown = model.reconstruct(frames)
    x, y = (torch.from_numpy(each).permute(0, 3, 1, 2).double() / 255 for each in (frames, shown))
    codes = model.encode(x.float()).flatten().tolist()
    shares = np.array([codes.count(code) for code in set(codes)]) / len(codes)
    quality = evaluate(model, frames, 2)
    assert quality.psnr == pytest.approx(psnr(x, y).mean().item(), abs=0.02)  # displayed frames are rounded
    assert quality.ssim == pytest.approx(ssim(x, y).mean().item(), abs=1e-3)
    assert quality.code_usage == pytest.approx(len(set(codes)) / 40)
    assert quality.perplexity == pytest.approx(math.exp(-(shares * np.log(shares)).sum()))


# Runs


@pytest.fixture
def out(tmp_path):
    """A bundle with a configuration and nothing else yet."""
    CogVideo(SMALL).save_pretrained(tmp_path / "bundle")
    return tmp_path / "bundle"


def run(out, sources=("world:12",), settings=QUICK, frames=FEW, **options):
    tokenizer(tuple(sources), out=out, settings=settings, frames=frames, device="cpu", **options)


def rows(out):
    return [json.loads(line) for line in (out / ".tokenizer-run" / "metrics.jsonl").read_text().splitlines()]


def test_a_run_delivers_a_tokenizer(out, capsys):
    """Checks everything that the command promises: weights, clusters, contact sheets, metrics and messages."""
    run(out, logging=LoggingConfig(evaluate_every=4, checkpoint_every=3, tensorboard=True))
    model = CogVideo.from_pretrained(out)
    assert model.components == ("image_tokenizer", "cluster_labels")
    assert model.cluster_labels.tolist() == [0] * 40  # 40 codes per cluster
    assert model.autoencoder.decode(model.autoencoder.encode(torch.rand(1, 3, 24, 24))).shape == (1, 3, 24, 24)
    folder = out / ".tokenizer-run"
    for name in ("before.png", "after.png"):
        with Image.open(folder / name) as sheet:
            assert sheet.height == 2 * SIDE + 2
    learnt, measured = ([row for row in rows(out) if ("held_out" in row) == held] for held in (False, True))
    assert [row["step"] for row in learnt] == [3, 4, 6, 8]
    assert {"loss", "psnr", "learning_rate", "gradient_norm", "images_per_second", "pixels"} <= set(learnt[0])
    assert [row["step"] for row in measured] == [4, 8]
    assert set(measured[0]["held_out"]) == {"psnr", "ssim", "code_usage", "perplexity"}
    assert list((folder / "tensorboard").iterdir())
    report = json.loads((folder / "report.json").read_text())
    assert report["frames"] == {"train": 12, "held_out": 4}
    assert not (folder / "train.rgb").exists()
    said = capsys.readouterr()
    assert "No LPIPS weights are given" in said.err
    assert "12 frames to train on and 4 held out" in said.err
    assert "PSNR" in said.out


def test_a_run_that_is_over_is_left_alone(out):
    """Prevents a repeated command from spending hours or changing weights."""
    run(out)
    before = (out / "bundle.json").read_bytes()
    run(out)
    assert (out / "bundle.json").read_bytes() == before


def test_another_run_in_the_folder_is_refused(out):
    """Prevents the weights of two recipes from mixing."""
    run(out)
    with pytest.raises(ValueError, match=r"another run began in .*settings.batch was 2 and is 3"):
        run(out, settings=replace(QUICK, batch=3))
    with pytest.raises(ValueError, match=r"another run began in .*sources"):
        run(out, sources=("world:13",))


def test_a_tokenizer_is_trained_on(out, tmp_path, capsys):
    """Guards --init: training starts from the given weights, codebook and codes, which stay the same if it hardly
    changes them; a run is tied to what it started from."""
    run(out)
    before = CogVideo.from_pretrained(out).autoencoder
    still = replace(QUICK, learning_rate=1e-12, adversary_weight=0, codebook_decay=0.999999, restart_below=1e-9)
    run(tmp_path / "still", init=str(out), settings=still)
    after = CogVideo.from_pretrained(tmp_path / "still")
    assert after.config == SMALL
    for name, tensor in before.state_dict().items():
        torch.testing.assert_close(after.autoencoder.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
    assert "commitment" in rows(tmp_path / "still")[0], "codes from the first step"
    assert "by k-means" in capsys.readouterr().err
    run(tmp_path / "moved", init=str(out))
    assert "by k-means" not in capsys.readouterr().err
    moved = CogVideo.from_pretrained(tmp_path / "moved").autoencoder
    assert not torch.equal(moved.codebook.embedding, before.codebook.embedding)
    typed = re.escape(str(out))
    with pytest.raises(ValueError, match=rf"another run began in .*init was {typed} \(sha256 \w{{12}}\) and is None"):
        run(tmp_path / "moved")
    with pytest.raises(ValueError, match="differ in size"):
        run(tmp_path / "other", init=str(out), preset="pocket")
    CogVideo(SMALL).save_pretrained(tmp_path / "empty")
    with pytest.raises(ValueError, match="has no image tokenizer to start from"):
        run(tmp_path / "other", init=str(tmp_path / "empty"))


def test_a_tokenizer_is_not_replaced_unasked(out):
    """Protects models that learned the tokenizer's codes: with another tokenizer, they would see noise."""
    CogVideo(SMALL, image_tokenizer=Autoencoder(SIZES)).save_pretrained(out)
    with pytest.raises(ValueError, match=r"has an image tokenizer.*--overwrite"):
        run(out)
    run(out, overwrite=True)
    assert CogVideo.from_pretrained(out).components == ("image_tokenizer", "cluster_labels")


def test_no_tokenizer_is_put_under_a_stage_unasked(out):
    """Protects a stage that was trained without its tokenizer in the bundle: it only knows that tokenizer's codes."""
    update(out, SMALL, base=Base(SMALL.transformer))
    (out / "training.json").write_text(json.dumps({"base": {"tokenizer": "f" * 64}}))
    with pytest.raises(ValueError, match=r"has base, which learned .* another image tokenizer \(sha256 f{12}\): take"):
        run(out)
    assert not (out / ".tokenizer-run" / "train.rgb").exists()
    run(out, overwrite=True)
    assert "image_tokenizer" in CogVideo.from_pretrained(out).components


def test_what_may_surprise_is_said(out, tmp_path, capsys):
    """Guards the notices for a missing validation split and for a batch larger than all frames."""
    clips = tmp_path / "clips"
    clips.mkdir()
    for number, frame in enumerate(pictures(3)):
        Image.fromarray(frame).save(clips / f"{number}.png")
        (clips / f"{number}.txt").write_text(f"picture {number}")
    run(out, [str(clips)], settings=replace(QUICK, batch=5), options=SourceOptions(validation=0.0))
    said = capsys.readouterr().err
    assert "The sources have no split but train (one in twenty clips becomes validation" in said
    assert "A batch of 5 is larger than the 2 frames: it repeats them." in said
    CogVideo(SMALL).save_pretrained(tmp_path / "other")
    run(tmp_path / "other")
    said = capsys.readouterr().err
    assert "no split but train" not in said
    assert "is larger than" not in said


def steps_of(out):
    """Steps of the existing checkpoints."""
    return Checkpoints(out / ".tokenizer-run" / "checkpoints", keep=0).steps()


def test_divergence_keeps_the_last_checkpoint(out, monkeypatch):
    """Prevents weights that are not finite from being saved or delivered."""
    real = TokenizerObjective.forward

    def forward(self, batch):
        loss, parts = real(self, batch)
        return BatchLosses(loss * math.nan if self._step == 6 else loss, parts)

    monkeypatch.setattr(TokenizerObjective, "forward", forward)
    with pytest.raises(ValueError, match="training diverged: the loss is nan at step 7"):
        run(out, logging=LoggingConfig(checkpoint_every=3))
    assert steps_of(out) == [3, 6]
    assert CogVideo.from_pretrained(out).components == ()


def test_ctrl_c_saves_and_continues(out, tmp_path, monkeypatch):
    """Ctrl-C must not lose any work, and the result must be that of an uninterrupted run."""
    CogVideo(SMALL).save_pretrained(tmp_path / "whole")
    run(tmp_path / "whole")
    real = TokenizerObjective.begin

    def begin(self, step):
        if step == 4:
            os.kill(os.getpid(), 2)
        real(self, step)

    monkeypatch.setattr(TokenizerObjective, "begin", begin)
    with pytest.raises(KeyboardInterrupt):
        run(out)
    monkeypatch.undo()
    assert steps_of(out) == [5]
    run(out)
    assert same_files(out, tmp_path / "whole")


def test_an_old_checkpoint_continues(out, tmp_path):
    """Guards runs that have a checkpoint in the tokenizer's old format: they resume to the same bits."""
    CogVideo(SMALL).save_pretrained(tmp_path / "whole")
    settings = replace(QUICK, optimizer="muon", adversary_start=2)
    run(tmp_path / "whole", settings=settings)
    folder = out / ".tokenizer-run"
    shutil.copytree(tmp_path / "whole" / ".tokenizer-run", folder)
    (folder / "report.json").unlink()
    shutil.rmtree(folder / "checkpoints")
    frames = np.array(frame_store.fetch(folder, ("world:12",), OPTIONS, SIZED).train)
    model = trainer(frames, settings)
    for step in range(5):
        make_step(model, step)
    adam, muon, judging = (each.state_dict() for each in model.optimizers)
    objective = model.objective
    averages = {name: each for name, each in objective.codebook.state_dict().items() if name != "rows"}
    state = {
        "autoencoder": objective.model.state_dict(),
        "discriminator": objective.discriminator.state_dict(),
        "codebook": averages | {"codebook.embedding": objective.codebook.rows},
        "optimizer": adam | {"muon": [muon]},
        "adversary_optimizer": judging,
    }
    torch.save((5, state), folder / "checkpoint.pt")
    run(out, settings=settings)
    assert same_files(out, tmp_path / "whole")


def same_files(one, other):
    names = ("image_tokenizer.safetensors", "cluster_labels.safetensors")
    return all((one / name).read_bytes() == (other / name).read_bytes() for name in names)


def command_of(out, steps):
    """Command line with the settings of `run`, and a checkpoint every third step."""
    options = {"steps": steps, "batch": 2, "warmup": 1, "plain-steps": 2, "start-vectors": 2, "adversary-start": 4}
    options |= {"adversary-width": 4, "num-frames": 12, "num-held-out": 4, "frames-per-clip": 4}
    options |= {"checkpoint-every": 3, "device": "cpu", "out": out}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    return ["train", "tokenizer", "world:12", *words]


def test_a_full_disk_is_one_line_and_loses_nothing(out, capsys):
    """A checkpoint that cannot be written must give a one-line error, and the same command must work later."""
    command, checkpoints = command_of(out, 4), out / ".tokenizer-run" / "checkpoints"
    with full_disk(30_000):  # fits the frames, but not a checkpoint
        assert main(command) == 2
    told = capsys.readouterr().err
    last = f"the checkpoint cannot be written (File too large): {checkpoints / '.step-00000003'}"
    assert told.splitlines()[-1] == f"cogvideo: error: {last}"
    assert "Traceback" not in told
    assert "step 1 of 4: " in told, "the log says where it stands"
    assert steps_of(out) == []
    assert main(command) == 0


def test_a_killed_process_continues_to_the_same_bits(out, tmp_path, capsys):
    """Catches a half-written or incomplete checkpoint: the result would differ from that of an uninterrupted run."""
    CogVideo(SMALL).save_pretrained(tmp_path / "whole")
    run(tmp_path / "whole", settings=replace(QUICK, steps=12))
    command = command_of(out, 12)
    kill(paused(9, command, env=os.environ | {"OMP_NUM_THREADS": "1"}))
    capsys.readouterr()
    assert main(command) == 0
    assert "Continuing after step 6" in capsys.readouterr().err
    assert same_files(out, tmp_path / "whole")
    assert [row["step"] for row in rows(out) if "loss" in row] == [3, 6, 9, 12]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sources": ()}, "there is no source"),
        ({"preset": "pocket"}, "a different configuration from the preset pocket"),
        ({"preset": "large"}, "unknown preset 'large'"),
        ({"device": "abacus"}, "cannot use the device 'abacus'"),
        ({"sources": ("world:0",)}, "expected world:COUNT"),
        ({"frames": replace(FEW, clips=FrameSettings(size=30))}, "size is 30x30, expected multiples of 4"),
        ({"frames": replace(FEW, clips=FrameSettings(size=20))}, "size is 20x20, expected at least 24"),
        ({"settings": replace(QUICK, pyramid_levels=7)}, "size is 24x24, expected at least 64"),
    ],
)
def test_mistakes_are_refused_at_once(out, options, message):
    """Mistakes must be reported before any clip is read, and leave no frames behind."""
    with pytest.raises(ValueError, match=message):
        tokenizer(
            options.pop("sources", ("world:12",)),
            out=out,
            **{"settings": QUICK, "frames": FEW, "device": "cpu"} | options,
        )
    assert not (out / ".tokenizer-run" / "train.rgb").exists()


def test_lpips_needs_both_files(out, tmp_path):
    """Prevents a single file from being silently ignored, or failing with a missing key."""
    with pytest.raises(ValueError, match="LPIPS needs two files"):
        run(out, vgg=tmp_path / "vgg16.pth")
    with pytest.raises(ValueError, match=r"cannot read .*vgg16.pth"):
        run(out, vgg=tmp_path / "vgg16.pth", lpips=tmp_path / "vgg.pth")


def test_lpips_is_taken_from_the_cache(out, tmp_path, monkeypatch, capsys):
    """Guards recipes with `perceptual = "lpips"`: fetched weights are used; if missing, the error says how to fetch."""
    monkeypatch.setenv("COGVIDEO_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match="expected the weights that `cogvideo fetch lpips` puts there"):
        run(out, perceptual="lpips")
    with pytest.raises(ValueError, match="leave out --vgg and --lpips"):
        run(out, perceptual="lpips", vgg=tmp_path / "vgg16.pth", lpips=tmp_path / "vgg.pth")
    model = Lpips()
    path = tmp_path / "networks" / "lpips-vgg.safetensors"
    path.parent.mkdir()
    save_file({file_name(name): tensor for name, tensor in model.state_dict().items()}, path)
    with pytest.raises(ValueError, match="does not have the weights that `cogvideo fetch lpips` puts there"):
        run(out, perceptual="lpips")
    monkeypatch.setitem(cache.DIGESTS, "lpips-vgg", cache.digest(load_file(path)))
    run(out, perceptual="lpips")
    assert f"LPIPS with the weights {path}" in capsys.readouterr().err
    assert json.loads((out / ".tokenizer-run/report.json").read_text())["perceptual"] == "pyramid, edges and LPIPS"


def test_out_may_not_be_a_file(tmp_path):
    """Catches an --out that is a file at once, rather than when the tokenizer is written."""
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        run(tmp_path / "file")
