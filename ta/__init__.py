"""Align language models with plain functions: data in, data out."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:  # what `ta.NAME` is, for editors; NAMES below says the same and a test compares
    from ta import losses as losses
    from ta import media as media
    from ta import parallel as parallel
    from ta import rag as rag
    from ta import rl as rl
    from ta.builtin.data_files import data_or_builtin as data_or_builtin
    from ta.builtin.fine_tuned import prefer_trained_builtin as prefer_trained_builtin
    from ta.builtin.fine_tuned import train_builtin_first as train_builtin_first
    from ta.chat.cut import cut_dialogue as cut_dialogue
    from ta.chat.encode import encode_answers as encode_answers
    from ta.chat.encode import encode_chat as encode_chat
    from ta.chat.encode import encode_dialogues as encode_dialogues
    from ta.chat.encode import encode_prompt as encode_prompt
    from ta.chat.encode import encode_prompts as encode_prompts
    from ta.chat.encode import loss_weights as loss_weights
    from ta.chat.render import render_chat as render_chat
    from ta.chat.render import tokenize_with_loss_mask as tokenize_with_loss_mask
    from ta.chat.template import ChatConfig as ChatConfig
    from ta.chat.tokenizer import ChatTokenizer as ChatTokenizer
    from ta.chat.tokenizer import TokenizerConfig as TokenizerConfig
    from ta.chat.tokenizer import load_chat_tokenizer as load_chat_tokenizer
    from ta.command_line import Range as Range
    from ta.command_line import cli as cli
    from ta.data.batch import Batch as Batch
    from ta.data.batch import lay_out as lay_out
    from ta.data.loader import BatchConfig as BatchConfig
    from ta.data.loader import ContextConfig as ContextConfig
    from ta.data.loader import check_margins as check_margins
    from ta.data.loader import collate_chats as collate_chats
    from ta.data.loader import collate_classes as collate_classes
    from ta.data.loader import collate_pairs as collate_pairs
    from ta.data.loader import labelled_collate as labelled_collate
    from ta.data.loader import labels_of as labels_of
    from ta.data.loader import read_ahead as read_ahead
    from ta.data.loader import row_parts as row_parts
    from ta.data.loader import source_rows as source_rows
    from ta.data.loader import train_batches as train_batches
    from ta.data.loader import val_batches as val_batches
    from ta.data.pad_token import with_own_pad_token as with_own_pad_token
    from ta.data.prepare import DataConfig as DataConfig
    from ta.data.prepare import first_records as first_records
    from ta.data.prepare import prepare_chats as prepare_chats
    from ta.data.prepare import prepare_classes as prepare_classes
    from ta.data.prepare import prepare_labelled as prepare_labelled
    from ta.data.prepare import prepare_pairs as prepare_pairs
    from ta.data.prepare import prepare_questions as prepare_questions
    from ta.data.prepare import preview as preview
    from ta.data.prepare import sequence as sequence
    from ta.data.sources import Drops as Drops
    from ta.data.sources import read_records as read_records
    from ta.files import append_line as append_line
    from ta.folders import ModelConfig as ModelConfig
    from ta.folders import copy_media as copy_media
    from ta.folders import fingerprint as fingerprint
    from ta.folders import resolve as resolve
    from ta.generation.answers_file import AnswersFile as AnswersFile
    from ta.generation.answers_file import model_key as model_key
    from ta.generation.candidates import choose_best as choose_best
    from ta.generation.candidates import choose_random as choose_random
    from ta.generation.candidates import choose_rejection as choose_rejection
    from ta.generation.generate import generate as generate
    from ta.generation.generate import limits_of as limits_of
    from ta.generation.metrics import measure as measure
    from ta.generation.metrics import roc_auc as roc_auc
    from ta.generation.metrics import spacing_note as spacing_note
    from ta.generation.prompts import read_prompts as read_prompts
    from ta.generation.samples import SamplesConfig as SamplesConfig
    from ta.generation.samples import generate_samples as generate_samples
    from ta.generation.score import answer_logprobs as answer_logprobs
    from ta.generation.score import class_names_of as class_names_of
    from ta.generation.score import num_labels_of as num_labels_of
    from ta.generation.score import reward_answers as reward_answers
    from ta.generation.score import score as score
    from ta.generation.settings import Ending as Ending
    from ta.generation.settings import GenerateConfig as GenerateConfig
    from ta.generation.settings import answers_to_json as answers_to_json
    from ta.generation.settings import check_prompts as check_prompts
    from ta.generation.settings import parse_settings as parse_settings
    from ta.generation.settings import with_stop_strings as with_stop_strings
    from ta.generation.vllm_engine import VllmConfig as VllmConfig
    from ta.generation.vllm_engine import VllmModelConfig as VllmModelConfig
    from ta.generation.vllm_engine import check_engine as check_engine
    from ta.generation.vllm_engine import start_vllm as start_vllm
    from ta.generation.vllm_server import open_server as open_server
    from ta.model.adapters import AdapterConfig as AdapterConfig
    from ta.model.adapters import load_adapter as load_adapter
    from ta.model.adapters import logits_agree as logits_agree
    from ta.model.adapters import merge_adapter as merge_adapter
    from ta.model.adapters import probe_logits as probe_logits
    from ta.model.export import export as export
    from ta.model.language_model import LanguageModel as LanguageModel
    from ta.model.language_model import native_attention as native_attention
    from ta.model.language_model import wrap as wrap
    from ta.model.load import ComputeConfig as ComputeConfig
    from ta.model.load import cast_parameters as cast_parameters
    from ta.model.load import check_context as check_context
    from ta.model.load import load_base as load_base
    from ta.model.load import load_for_inference as load_for_inference
    from ta.model.load import load_model as load_model
    from ta.model.logprobs import cross_entropy_sum as cross_entropy_sum
    from ta.model.logprobs import token_logprobs as token_logprobs
    from ta.model.new_rows import check_vocabulary as check_vocabulary
    from ta.reference import ReferenceConfig as ReferenceConfig
    from ta.reference import check_same_vocabulary as check_same_vocabulary
    from ta.reference import count_learned as count_learned
    from ta.reference import note_sync as note_sync
    from ta.reference import open_reference as open_reference
    from ta.reference import sequence_logps as sequence_logps
    from ta.reference import with_cached_reference as with_cached_reference
    from ta.screen import progress as progress
    from ta.screen import table as table
    from ta.training.loop import mean_over as mean_over
    from ta.training.loop import scores_of as scores_of
    from ta.training.loop import train as train
    from ta.training.model_card import model_card as model_card
    from ta.training.optim import OptimConfig as OptimConfig
    from ta.training.optim import make_optimizer as make_optimizer
    from ta.training.optim import with_default_lr as with_default_lr
    from ta.training.progress import join_figures as join_figures
    from ta.training.report import comparison as comparison
    from ta.training.run_folder import LoopConfig as LoopConfig
    from ta.training.run_folder import Run as Run
    from ta.training.run_folder import start_run as start_run

NAMES = {  # module: what `import ta` gives of it, loaded on first use
    "ta.command_line": "Range cli",
    "ta.folders": "ModelConfig copy_media fingerprint resolve",
    "ta.builtin.data_files": "data_or_builtin",
    "ta.builtin.fine_tuned": "train_builtin_first prefer_trained_builtin",
    "ta.chat.template": "ChatConfig",
    "ta.chat.render": "render_chat tokenize_with_loss_mask",
    "ta.chat.cut": "cut_dialogue",
    "ta.chat.encode": "encode_answers encode_chat encode_dialogues encode_prompt "
    "encode_prompts loss_weights",
    "ta.chat.tokenizer": "ChatTokenizer TokenizerConfig load_chat_tokenizer",
    "ta.data.pad_token": "with_own_pad_token",
    "ta.data.prepare": "DataConfig first_records prepare_chats prepare_classes prepare_labelled "
    "prepare_pairs prepare_questions preview sequence",
    "ta.files": "append_line",
    "ta.data.batch": "Batch lay_out",
    "ta.data.loader": "BatchConfig ContextConfig check_margins collate_chats collate_classes "
    "collate_pairs labelled_collate labels_of read_ahead row_parts source_rows train_batches "
    "val_batches",
    "ta.model.adapters": "AdapterConfig load_adapter logits_agree merge_adapter probe_logits",
    "ta.model.load": "ComputeConfig cast_parameters check_context load_base load_for_inference "
    "load_model",
    "ta.model.language_model": "LanguageModel native_attention wrap",
    "ta.model.logprobs": "cross_entropy_sum token_logprobs",
    "ta.model.export": "export",
    "ta.generation.generate": "generate limits_of",
    "ta.generation.metrics": "measure roc_auc spacing_note",
    "ta.generation.samples": "SamplesConfig generate_samples",
    "ta.data.sources": "Drops read_records",
    "ta.generation.settings": "Ending GenerateConfig answers_to_json check_prompts parse_settings "
    "with_stop_strings",
    "ta.generation.answers_file": "AnswersFile model_key",
    "ta.generation.prompts": "read_prompts",
    "ta.generation.candidates": "choose_best choose_random choose_rejection",
    "ta.generation.score": "answer_logprobs class_names_of num_labels_of reward_answers score",
    "ta.generation.vllm_server": "open_server",
    "ta.generation.vllm_engine": "VllmConfig VllmModelConfig check_engine start_vllm",
    "ta.model.new_rows": "check_vocabulary",
    "ta.reference": "ReferenceConfig check_same_vocabulary note_sync count_learned "
    "open_reference sequence_logps with_cached_reference",
    "ta.screen": "progress table",
    "ta.training.report": "comparison",
    "ta.training.run_folder": "LoopConfig Run start_run",
    "ta.training.model_card": "model_card",
    "ta.training.loop": "mean_over scores_of train",
    "ta.training.progress": "join_figures",
    "ta.training.optim": "OptimConfig make_optimizer with_default_lr",
}
MODULES = ("losses", "media", "parallel", "rag", "rl")  # given whole
_HOME = {name: module for module, names in NAMES.items() for name in names.split()}
__all__ = sorted([*_HOME, *MODULES])


def __getattr__(name: str) -> Any:
    if name in MODULES:
        return import_module(f"ta.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'ta' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME, *MODULES})
