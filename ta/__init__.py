"""Align language models with plain functions: data in, data out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ta.faces import face

__version__ = "0.1.0"

if TYPE_CHECKING:  # what the package gives, listed here for editors and for face()
    from ta import (
        convert as convert,
        losses as losses,
        media as media,
        model as model,
        parallel as parallel,
        rag as rag,
        rl as rl,
    )
    from ta.builtin.data_files import (
        data_or_builtin as data_or_builtin,
        given_or_held_out as given_or_held_out,
    )
    from ta.builtin.fine_tuned import (
        prefer_trained_builtin as prefer_trained_builtin,
        train_builtin_first as train_builtin_first,
    )
    from ta.chat.cut import cut_dialogue as cut_dialogue
    from ta.chat.encode import (
        encode_answers as encode_answers,
        encode_chat as encode_chat,
        encode_dialogues as encode_dialogues,
        encode_prompt as encode_prompt,
        encode_prompts as encode_prompts,
        loss_weights as loss_weights,
    )
    from ta.chat.render import (
        render_chat as render_chat,
        tokenize_with_loss_mask as tokenize_with_loss_mask,
    )
    from ta.chat.template import ChatConfig as ChatConfig
    from ta.chat.tokenizer import (
        ChatTokenizer as ChatTokenizer,
        TokenizerConfig as TokenizerConfig,
        load_chat_tokenizer as load_chat_tokenizer,
    )
    from ta.command_line import Range as Range, cli as cli
    from ta.data.batch import Batch as Batch, lay_out as lay_out
    from ta.data.loader import (
        check_margins as check_margins,
        collate_chats as collate_chats,
        collate_classes as collate_classes,
        collate_pairs as collate_pairs,
        labelled_collate as labelled_collate,
        labels_of as labels_of,
        read_ahead as read_ahead,
        source_rows as source_rows,
        train_batches as train_batches,
        val_batches as val_batches,
    )
    from ta.data.micro import (
        BatchConfig as BatchConfig,
        ContextConfig as ContextConfig,
        row_parts as row_parts,
    )
    from ta.data.pad_token import with_own_pad_token as with_own_pad_token
    from ta.data.prepare import (
        DataConfig as DataConfig,
        first_records as first_records,
        prepare_chats as prepare_chats,
        prepare_classes as prepare_classes,
        prepare_labelled as prepare_labelled,
        prepare_pairs as prepare_pairs,
        prepare_questions as prepare_questions,
        preview as preview,
        sequence as sequence,
    )
    from ta.data.sources import Drops as Drops, read_records as read_records
    from ta.files import append_line as append_line
    from ta.folders import (
        ModelConfig as ModelConfig,
        copy_media as copy_media,
        fingerprint as fingerprint,
        resolve as resolve,
    )
    from ta.generation.answers_file import AnswersFile as AnswersFile, model_key as model_key
    from ta.generation.candidates import (
        choose_best as choose_best,
        choose_random as choose_random,
        choose_rejection as choose_rejection,
    )
    from ta.generation.generate import generate as generate, limits_of as limits_of
    from ta.generation.metrics import (
        measure as measure,
        roc_auc as roc_auc,
        spacing_note as spacing_note,
    )
    from ta.generation.prompts import read_prompts as read_prompts
    from ta.generation.score import (
        answer_logprobs as answer_logprobs,
        class_names_of as class_names_of,
        num_labels_of as num_labels_of,
        reward_answers as reward_answers,
        score as score,
    )
    from ta.generation.settings import (
        Ending as Ending,
        GenerateConfig as GenerateConfig,
        SamplesConfig as SamplesConfig,
        VllmConfig as VllmConfig,
        VllmModelConfig as VllmModelConfig,
        answers_to_json as answers_to_json,
        check_prompts as check_prompts,
        named_settings as named_settings,
        parse_settings as parse_settings,
        with_stop_strings as with_stop_strings,
    )
    from ta.generation.vllm_engine import check_engine as check_engine, start_vllm as start_vllm
    from ta.generation.vllm_server import open_server as open_server
    from ta.model.adapters import (
        load_adapter as load_adapter,
        logits_agree as logits_agree,
        merge_adapter as merge_adapter,
        probe_logits as probe_logits,
    )
    from ta.model.attention import native_attention as native_attention
    from ta.model.export import export as export
    from ta.model.language_model import LanguageModel as LanguageModel, wrap as wrap
    from ta.model.load import (
        cast_parameters as cast_parameters,
        check_context as check_context,
        load_base as load_base,
        load_for_inference as load_for_inference,
        load_model as load_model,
    )
    from ta.model.logprobs import (
        cross_entropy_sum as cross_entropy_sum,
        token_logprobs as token_logprobs,
    )
    from ta.model.settings import (
        AdapterConfig as AdapterConfig,
        ComputeConfig as ComputeConfig,
        ReferenceConfig as ReferenceConfig,
    )
    from ta.model.new_rows import check_vocabulary as check_vocabulary
    from ta.reference import (
        check_same_vocabulary as check_same_vocabulary,
        count_learned as count_learned,
        note_sync as note_sync,
        open_reference as open_reference,
        sequence_logps as sequence_logps,
        with_cached_reference as with_cached_reference,
    )
    from ta.screen import progress as progress, table as table
    from ta.training.loop import mean_over as mean_over, scores_of as scores_of, train as train
    from ta.training.final import export_run as export_run, model_card as model_card
    from ta.training.optim import make_optimizer as make_optimizer
    from ta.training.progress import join_figures as join_figures
    from ta.training.report import comparison as comparison
    from ta.training.run_folder import LoopConfig as LoopConfig, Run as Run, start_run as start_run
    from ta.training.samples import generate_samples as generate_samples
    from ta.training.settings import (
        OptimConfig as OptimConfig,
        ScheduleConfig as ScheduleConfig,
        with_default_lr as with_default_lr,
    )

__getattr__, __all__ = face(__name__, __file__)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
