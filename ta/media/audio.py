"""Sounds from disk to arrays: mono samples of wav files, and the two published spectrograms."""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from ta.media.images import check_file

if TYPE_CHECKING:
    from transformers import WhisperFeatureExtractor

RATE = 16_000
MAX_SECONDS = 600.0


def read_audio(path: str | Path, rate: int = RATE) -> np.ndarray:
    """Decode a PCM wav file (8, 16, 24 or 32 bits) to (N,) float32 in [-1, 1], N at `rate` Hz.

    Channels are averaged. The length is read from the header and checked against MAX_SECONDS
    before anything is decoded; where the header does not know it, as of a file that was written to
    a pipe, the sound goes on to the end of the file. ValueError names the path of what is missing,
    empty, too long, cut short or no such file.
    """
    check_file(path)
    with open(path, "rb") as file:
        channels, width, given_rate, size = _wav_header(file, path)
        count, rest = divmod(size, channels * width)
        seconds = count / given_rate
        if count < 1:
            raise ValueError(f"{path}: no samples in it; remove it or record it again")
        if seconds > MAX_SECONDS:
            raise ValueError(
                f"{path}: {seconds:.1f} s of sound, the limit is {MAX_SECONDS:g} s; cut it into "
                "pieces"
            )
        promised = size - rest
        data = file.read(promised)
    if len(data) != promised:
        raise ValueError(
            f"{path}: cut short: {len(data)} bytes of sound, its header promises {promised}"
        )
    raw = np.frombuffer(data, np.uint8)
    if width == 1:
        # 8-bit wav is unsigned, the wider ones are signed
        samples = raw.astype(np.float64) / 128 - 1
    else:
        # the missing low bytes are zero, the sign stays on top
        wide = np.zeros((count * channels, 4), np.uint8)
        wide[:, 4 - width :] = raw.reshape(-1, width)
        samples = wide.view("<i4")[:, 0] / float(1 << 31)
    mono = samples.reshape(count, channels).mean(axis=1)
    return resample(mono, given_rate, rate).astype(np.float32)


PCM, EXTENSIBLE = 1, 0xFFFE
UNKNOWN_SIZE = 0x7FFFF000  # from here on a size is what a program writes that cannot know it


def _wav_header(file: BinaryIO, path: str | Path) -> tuple[int, int, int, int]:
    """Channels, bytes of a sample, samples a second, bytes of sound; `file` is then at the sound.

    An extensible header names its format in a field of its own.
    """

    def wrong(why: str) -> ValueError:
        return ValueError(f"{path}: not a PCM wav file ({why}); convert it to 16-bit PCM wav")

    start = file.read(12)
    if start[:4] != b"RIFF" or start[8:] != b"WAVE":
        raise wrong("it does not begin with RIFF and WAVE")
    form = b""
    while len(head := file.read(8)) == 8:
        name, size = head[:4], int.from_bytes(head[4:], "little")
        if name == b"data":
            break
        # a chunk of odd size has one byte more
        chunk = file.read(size + size % 2)
        if name == b"fmt ":
            form = chunk
    else:
        raise wrong("cut short before its sound")
    if len(form) < 16:
        raise wrong("its format stands behind its sound, or nowhere")
    tag, channels, given_rate, _, _, bits = struct.unpack("<HHIIHH", form[:16])
    if tag == EXTENSIBLE and len(form) >= 26:
        tag = int.from_bytes(form[24:26], "little")
    width = (bits + 7) // 8
    if tag != PCM or channels < 1 or given_rate < 1 or width not in (1, 2, 3, 4):
        raise wrong(f"format {tag}, {channels} channels of {bits} bits at {given_rate} Hz")
    left = os.fstat(file.fileno()).st_size - file.tell()
    unknown = size > left and size >= UNKNOWN_SIZE
    return channels, width, given_rate, left if unknown else size


def resample(samples: np.ndarray, rate: int, to: int) -> np.ndarray:
    """(N,) samples at `rate` Hz to (ceil(N * to / rate),) float64 at `to` Hz.

    The polyphase filter is a sinc of 16 crossings under a Hann window, cut at 0.95 of the
    lower Nyquist frequency (Smith, Digital Audio Resampling). A constant stays the same constant.
    """
    if rate == to:
        return samples.astype(np.float64)
    common = math.gcd(rate, to)
    up, down = to // common, rate // common  # output n sits at input position n * down / up
    cutoff = min(1.0, up / down) * 0.95
    reach = math.ceil(16 / cutoff)
    length = math.ceil(len(samples) * up / down)
    padded = np.pad(samples.astype(np.float64), (reach, reach + down + 1), mode="edge")
    windows = np.lib.stride_tricks.sliding_window_view(padded, 2 * reach + 1)
    out = np.empty(length)
    for phase in range(min(up, length)):
        start, fraction = divmod(phase * down, up)
        # input samples before and after this output
        offset = np.arange(-reach, reach + 1) - fraction / up
        hann = np.cos(np.pi / 2 * np.clip(offset / reach, -1, 1)) ** 2
        taps = np.sinc(offset * cutoff) * hann
        rows = windows[start::down][: len(out[phase::up])]
        out[phase::up] = rows @ (taps / taps.sum())
    return out


def whisper_mels(path: str | Path, extractor: WhisperFeatureExtractor) -> np.ndarray:
    """Whisper's log-mel spectrogram (mels, frames) float32 of a file, padded with silence.

    ValueError for a sound that is longer than the window.
    """
    samples = read_audio(path, extractor.sampling_rate)
    if len(samples) > extractor.n_samples:
        seconds = len(samples) / extractor.sampling_rate
        raise ValueError(
            f"{path}: {seconds:.1f} s of sound, this encoder hears {extractor.chunk_length} s; "
            "cut the file into pieces"
        )
    mels = extractor(samples, sampling_rate=extractor.sampling_rate, return_tensors="np")
    return mels["input_features"][0]


def fbank_clips(path: str | Path, mels: int, frames: int, clips: int) -> np.ndarray:
    """ImageBind's input (clips, 1, mels, frames) float32 (arXiv 2305.05665, appendix on data).

    `clips` stretches of two seconds lie evenly over the file. Each becomes a log filter bank,
    padded with zeros or cut to `frames`, then (x + 4.268) / 9.138.
    """
    samples = read_audio(path)
    length = 2 * RATE
    last = max(len(samples) - length, 0)
    starts = [round(i * last / max(clips - 1, 1)) for i in range(clips)]
    banks = [kaldi_fbank(samples[start : start + length], mels)[:, :frames] for start in starts]
    padded = np.zeros((clips, mels, frames), np.float32)
    for clip, bank in zip(padded, banks, strict=True):
        clip[:, : bank.shape[1]] = bank
    return ((padded[:, None] + 4.268) / 9.138).astype(np.float32)


def kaldi_fbank(samples: np.ndarray, mels: int) -> np.ndarray:
    """Kaldi's log mel filter bank (mels, frames) of 16 kHz samples.

    Windows are 25 ms, Hann, every 10 ms; the mean is removed, and there is no dither.
    """
    from transformers.audio_utils import mel_filter_bank, spectrogram, window_function

    if len(samples) < 400:
        samples = np.pad(samples, (0, 400 - len(samples)))  # shorter than one window
    return spectrogram(
        samples - samples.mean(),
        window_function(400, "hann", periodic=False),
        frame_length=400,
        hop_length=160,
        fft_length=512,
        power=2.0,
        center=False,
        preemphasis=0.97,
        remove_dc_offset=True,
        mel_filters=mel_filter_bank(
            257,
            mels,
            20,
            RATE // 2,
            RATE,
            norm=None,
            mel_scale="kaldi",
            triangularize_in_mel_space=True,
        ),
        log_mel="log",
        mel_floor=float(np.finfo(np.float32).eps),
    )
