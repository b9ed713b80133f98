"""Sound: wav files of every width, resampling, bad files, and spectrograms against formulas written out again."""

import struct
import wave

import numpy as np
import pytest

from ta.media.audio import RATE, fbank_clips, kaldi_fbank, read_audio, resample, whisper_mels


def write_wav(path, samples, rate=RATE, width=2):
    """`samples` (N,) or (N, channels) in [-1, 1] as PCM."""
    levels = np.round(np.asarray(samples, np.float64) * ((1 << (8 * width - 1)) - 1)).astype("<i8")
    data = (
        (levels + 128).astype(np.uint8)
        if width == 1
        else levels.reshape(-1, 1).view(np.uint8).reshape(-1, 8)[:, :width]
    )
    with wave.open(str(path), "wb") as sound:
        sound.setparams((1 if levels.ndim == 1 else levels.shape[1], width, rate, 0, "NONE", ""))
        sound.writeframes(data.tobytes())


def tone(hertz, seconds=1.0, rate=RATE):
    return 0.5 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)


@pytest.mark.parametrize("width", [1, 2, 3, 4])
def test_every_sample_width(tmp_path, width):
    write_wav(tmp_path / "a.wav", tone(440, 0.1), width=width)
    got = read_audio(tmp_path / "a.wav")
    assert got.dtype == np.float32 and got.shape == (1600,)
    np.testing.assert_allclose(got, tone(440, 0.1), atol=1.5 / (1 << (8 * width - 1)) + 1e-7)


def test_channels_are_averaged(tmp_path):
    left, right = tone(300, 0.05), tone(900, 0.05)
    write_wav(tmp_path / "a.wav", np.stack([left, right], 1))
    np.testing.assert_allclose(read_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-4)


@pytest.mark.parametrize("rate", [8000, 11025, 22050, 44100, 48000, 15999])
def test_resampling_keeps_a_tone_and_drops_what_cannot_be_heard(rate):
    got, expected = resample(tone(1000, 0.5, rate), rate, RATE), tone(1000, 0.5)
    middle = slice(400, min(len(got), len(expected)) - 400)
    assert abs(len(got) - len(expected)) <= 1
    assert np.abs(got[middle] - expected[middle]).max() < 2e-3
    np.testing.assert_allclose(resample(np.ones(500), rate, RATE), 1.0)
    if rate > 2 * 10_000:
        assert (
            np.abs(resample(tone(10_000, 0.5, rate), rate, RATE)[middle]).max() < 5e-3
        )  # would alias to 6 kHz
    assert resample(np.ones(1), rate, RATE).shape == (max(1, -(-RATE // rate)),)


def headed(samples, form, size, before=b""):
    """A wav file of 16-bit samples with this format and this size of its data."""
    data = np.round(np.asarray(samples) * 32767).astype("<i2").tobytes()
    chunks = b"fmt " + len(form).to_bytes(4, "little") + form + before
    whole = b"WAVE" + chunks + b"data" + size.to_bytes(4, "little") + data
    return b"RIFF" + size.to_bytes(4, "little") + whole


PLAIN = struct.pack("<HHIIHH", 1, 1, RATE, 2 * RATE, 2, 16)
GUID = bytes.fromhex("0100000000001000800000aa00389b71")
EXTENSIBLE = struct.pack("<HHIIHHHHI", 0xFFFE, 1, RATE, 2 * RATE, 2, 16, 22, 16, 4) + GUID


@pytest.mark.parametrize("size", [3200, 0xFFFFFFFF, 0x7FFFFFFF, 0x7FFFF000])
@pytest.mark.parametrize(
    "form", [PLAIN, PLAIN + b"\0\0", EXTENSIBLE], ids=["plain", "longer", "extensible"]
)
@pytest.mark.parametrize("before", [b"", b"LIST\x03\0\0\0abc\0"], ids=["", "list"])
def test_headers_of_pipes_and_extensible_ones_are_read(tmp_path, size, form, before):
    """What ffmpeg leaves in a pipe, a header that names its format in a field, a chunk of odd size."""
    path = tmp_path / "a.wav"
    path.write_bytes(headed(tone(440, 0.1), form, size, before))
    got = read_audio(path)
    assert got.shape == (1600,)
    np.testing.assert_allclose(got, tone(440, 0.1), atol=1e-4)
    if size == 3200:
        with_more = path.read_bytes() + b"LIST\x04\0\0\0more"
        path.write_bytes(with_more)
        assert read_audio(path).shape == (1600,)  # what follows the sound is none
    path.write_bytes(headed(tone(440, 0.1), form, 3202, before))
    with pytest.raises(
        ValueError, match="cut short: 3200 bytes of sound, its header promises 3202"
    ):
        read_audio(path)
    floating = bytearray(form)
    floating[24 if form == EXTENSIBLE else 0] = 3
    path.write_bytes(headed(tone(440, 0.1), bytes(floating), size, before))
    with pytest.raises(ValueError, match="format 3, 1 channels of 16 bits at 16000 Hz"):
        read_audio(path)


def test_bad_sounds_are_named(tmp_path, monkeypatch):
    path = tmp_path / "bad.wav"
    write_wav(path, tone(440))
    whole = path.read_bytes()
    extensible = bytearray(whole)
    extensible[20:22] = (3).to_bytes(2, "little")  # the format tag of floating-point samples
    write_wav(path, [])
    silent = path.read_bytes()
    for data, reason in (
        (whole[:1000], "cut short|not a PCM wav"),
        (whole[:20], "not a PCM wav"),
        (b"", "is empty"),
        (b"hello " * 20, "not a PCM wav"),
        (bytes(extensible), "not a PCM wav"),
        (silent, "no samples"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=reason) as error:
            read_audio(path)
        assert "bad.wav" in str(error.value)
    path.write_bytes(whole)
    monkeypatch.setattr("ta.media.audio.MAX_SECONDS", 0.5)
    with pytest.raises(ValueError, match=r"1\.0 s of sound, the limit is 0\.5 s"):
        read_audio(path)
    with pytest.raises(ValueError, match="no such file"):
        read_audio(tmp_path / "none.wav")
    with pytest.raises(ValueError, match="is a directory"):
        read_audio(tmp_path)


def test_whisper_mels(tmp_path):
    from transformers import WhisperFeatureExtractor

    extractor = WhisperFeatureExtractor(feature_size=16, chunk_length=2)
    write_wav(tmp_path / "a.wav", tone(440))
    got = whisper_mels(tmp_path / "a.wav", extractor)
    assert got.shape == (16, 200) and got.dtype == np.float32
    # The formula of the published code: |STFT|^2, mel filters, log10, 8 decades of range, (x + 4) / 4.
    samples = np.pad(read_audio(tmp_path / "a.wav"), (0, RATE))
    padded = np.pad(samples, 200, mode="reflect")
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 400)
    power = np.stack(
        [np.abs(np.fft.rfft(padded[i : i + 400] * window)) ** 2 for i in range(0, 160 * 200, 160)],
        1,
    )
    logs = np.log10(np.maximum(extractor.mel_filters.T @ power, 1e-10))
    np.testing.assert_allclose(got, (np.maximum(logs, logs.max() - 8) + 4) / 4, atol=1e-4)
    write_wav(tmp_path / "long.wav", tone(440, 2.5))
    with pytest.raises(ValueError, match=r"long\.wav: 2\.5 s of sound, this encoder hears 2 s"):
        whisper_mels(tmp_path / "long.wav", extractor)


def kaldi_by_hand(samples, mels):
    """feature-fbank.cc and mel-computations.cc of Kaldi, one frame and one filter at a time."""
    mel = lambda hertz: 1127 * np.log(1 + hertz / 700)
    edges = np.linspace(mel(20), mel(8000), mels + 2)
    bins = mel(np.arange(256) * RATE / 512)  # Kaldi leaves the Nyquist bin out
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(400) / 399)
    out = []
    for start in range(0, len(samples) - 399, 160):
        frame = samples[start : start + 400] - samples[start : start + 400].mean()
        frame = frame - 0.97 * np.concatenate([frame[:1], frame[:-1]])
        power = np.abs(np.fft.rfft(frame * window, 512)[:256]) ** 2
        slopes = [
            np.minimum((bins - a) / (b - a), (c - bins) / (c - b))
            for a, b, c in zip(edges, edges[1:], edges[2:], strict=False)
        ]
        out.append(
            [
                np.log(max((np.maximum(slope, 0) * power).sum(), np.finfo(np.float32).eps))
                for slope in slopes
            ]
        )
    return np.array(out).T


def test_kaldi_filter_bank_by_hand():
    samples = np.random.default_rng(0).normal(size=4000) * 0.1
    samples -= samples.mean()
    np.testing.assert_allclose(kaldi_fbank(samples, 24), kaldi_by_hand(samples, 24), atol=1e-4)
    assert kaldi_fbank(samples[:100], 24).shape == (24, 1)


def test_clips_are_spread_over_the_file(tmp_path):
    write_wav(tmp_path / "a.wav", np.concatenate([tone(300, 2), tone(1000, 2), tone(3000, 2)]))
    clips = fbank_clips(tmp_path / "a.wav", 64, 204, 3)
    assert clips.shape == (3, 1, 64, 204) and clips.dtype == np.float32
    loudest = clips[:, 0, :, :198].mean(2).argmax(1)
    assert loudest[0] < loudest[1] < loudest[2]
    np.testing.assert_allclose(
        clips[:, :, :, 198:], 4.268 / 9.138, rtol=1e-6
    )  # 198 frames fit into 2 s, the rest is padding
    write_wav(tmp_path / "short.wav", tone(300, 0.5))
    short = fbank_clips(tmp_path / "short.wav", 64, 204, 3)
    assert (short[0] == short[1]).all() and (short[0] == short[2]).all()
    assert (fbank_clips(tmp_path / "a.wav", 64, 100, 1) == clips[:1, :, :, :100]).all()
