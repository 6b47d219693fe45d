"""The stages of Gristmill, each declared once. The work is in the rooms below; here is its place in the house."""

from __future__ import annotations

from pathlib import Path

from gristmill.data.decontaminate import DecontaminateConfig, check_decontamination, evaluation_files
from gristmill.data.decontaminate import decontaminate as decontaminate_documents
from gristmill.data.dedup import check_indexes, deduplicate, index_fingerprints
from gristmill.data.filters import FilterConfig, check_filters, filter_documents, rule_files
from gristmill.data.ingest import IngestConfig, check_sources, fingerprint_sources
from gristmill.data.ingest import ingest as ingest_documents
from gristmill.data.mix import mix as mix_tokens
from gristmill.data.problems import ExamConfig, make_exam, make_problems, problem_files
from gristmill.data.sources.base import Contents
from gristmill.data.spans import remove_spans
from gristmill.data.tokenize import tokenize as tokenize_documents
from gristmill.flows import estimates
from gristmill.flows.caches import CACHES
from gristmill.flows.fetched import is_remote, local_path
from gristmill.flows.report import make_report
from gristmill.flows.scaling import fit_ladder
from gristmill.flows.stage import Configs, Inputs, stage
from gristmill.flows.student import check_student, student_files, student_positions, student_tags, take_student
from gristmill.model.config import StudentConfig
from gristmill.model.evaluate import evaluate as evaluate_models
from gristmill.model.extend import extend as extend_context
from gristmill.model.hub import export as export_model
from gristmill.model.pretrain import pretrain as pretrain_model
from gristmill.model.rl.grpo import reinforce
from gristmill.model.sft import fine_tune
from gristmill.model.traces import sample_traces
from gristmill.model.training.config import MOST_PHASES, ExtendConfig, PretrainConfig, SFTConfig
from gristmill.model.training.inputs import check_context, check_extension, check_pretraining, check_tokenizer

HASHES = CACHES / "hashes.json"


def _hashes(files: list[str]) -> dict[str, str]:
    """Content hash of each file, by the name that the configuration gives it."""
    contents = Contents(HASHES)
    found = {file: contents.sha256(Path(file)) for file in files}
    contents.save()
    return found


def _problem_sources(config: ExamConfig) -> dict[str, str]:
    return _hashes(problem_files(config))


def _check_problems(config: ExamConfig) -> None:
    for file in problem_files(config):
        if not Path(file).is_file():
            raise ValueError(
                f"problems file {file!r} does not exist: correct problems.train_file or problems.test_file"
            )


def _ingest_sources(config: IngestConfig) -> dict[str, str]:
    return fingerprint_sources(config, HASHES)


def _rule_sources(config: FilterConfig) -> dict[str, str]:
    return _hashes(rule_files(config))


def _evaluation_sources(config: DecontaminateConfig) -> dict[str, str]:
    return _hashes(evaluation_files(config))


def _student_sources(config: StudentConfig) -> dict[str, str]:
    if is_remote(config.folder):
        return student_tags(config)
    folder = local_path(config.folder)
    return {Path(file).name: held for file, held in _hashes([str(folder / n) for n in student_files(config)]).items()}


def _check_distillation(config: SFTConfig, makers: Configs) -> None:
    if isinstance(student := makers["model"], StudentConfig):
        check_context(config, student_positions(student))


def _check_pretraining(config: PretrainConfig, inputs: Inputs) -> None:
    check_pretraining(config, inputs["tokens"], inputs["mixture"])


def _check_extension(config: ExtendConfig, inputs: Inputs) -> None:
    check_extension(config, inputs["model"], inputs["tokens"], inputs["mixture"])


def _check_tokenizer(config: object, inputs: Inputs) -> None:
    check_tokenizer(inputs["model"], inputs["tokenizer"])


def _check_evaluated(config: object, inputs: Inputs) -> None:
    for name in ("base", "cold_start", "zero", "rl"):
        check_tokenizer(inputs[name], inputs["tokenizer"])


ingest = stage(
    "ingest",
    version=2,
    title="Documents from sources",
    sources=_ingest_sources,
    check=check_sources,
    estimate=estimates.of_corpus(rate=4.0e6, kept=0.25),
)(ingest_documents)
exam = stage(
    "exam",
    version=1,
    title="Problems of the evaluation",
    sources=_problem_sources,
    check=_check_problems,
    estimate=estimates.of_exam,
)(make_exam)
problems = stage(
    "problems",
    version=1,
    title="Problems and chains of thought",
    sources=_problem_sources,
    check=_check_problems,
    estimate=estimates.of_problems,
)(make_problems)
dedup = stage(
    "dedup",
    version=2,
    title="Exact and near-duplicate removal",
    sources=index_fingerprints,
    check=check_indexes,
    estimate=estimates.of_corpus(rate=1.8e6, kept=0.25),
)(deduplicate)
spans = stage(
    "spans",
    version=1,
    title="Repeated lines, paragraphs and spans",
    estimate=estimates.of_corpus(rate=1.0e6, kept=0.3),
)(remove_spans)
filter_ = stage(
    "filter",
    version=3,
    title="Quality filters",
    sources=_rule_sources,
    check=check_filters,
    estimate=estimates.of_corpus(rate=2.2e6, kept=0.25),
)(filter_documents)
decontaminate = stage(
    "decontaminate",
    version=1,
    title="Evaluation sets out of the corpus",
    sources=_evaluation_sources,
    check=check_decontamination,
    estimate=estimates.of_corpus(rate=8.0e6, kept=0.25),
)(decontaminate_documents)
tokenize = stage(
    "tokenize",
    version=2,
    title="Tokenizer and token shards",
    estimate=estimates.of_corpus(rate=1.1e6, kept=0.9),
)(tokenize_documents)
mix = stage(
    "mix",
    version=1,
    title="Packed sequences and their mixture",
    estimate=estimates.of_corpus(rate=20.0e6, kept=0.05),
)(mix_tokens)
pretrain = stage(
    "pretrain",
    version=8,
    title="Pretraining of the base model",
    estimate=estimates.of_pretraining,
    check_inputs=_check_pretraining,
)(pretrain_model)
# A stage of a pipeline is called once: each phase of context extension has its own, by its number.
mix_longer = tuple(
    stage(
        f"mix_longer_{phase}",
        version=1,
        title=f"Longer sequences and their mixture, phase {phase}",
        estimate=estimates.of_corpus(rate=20.0e6, kept=0.05),
    )(mix_tokens)
    for phase in range(1, MOST_PHASES + 1)
)
extend = tuple(
    stage(
        f"extend_{phase}",
        version=5,
        title=f"Context extension, phase {phase}",
        estimate=estimates.of_extension,
        check_inputs=_check_extension,
    )(extend_context)
    for phase in range(1, MOST_PHASES + 1)
)
cold_start = stage(
    "cold_start",
    version=7,
    title="Cold start: fine-tuning on chains of thought",
    estimate=estimates.of_fine_tuning,
    check_inputs=_check_tokenizer,
)(fine_tune)
rl_zero = stage(
    "rl_zero",
    version=6,
    title="R1-Zero: reinforcement learning from the base",
    estimate=estimates.of_reinforcement,
    check_inputs=_check_tokenizer,
)(reinforce)
rl = stage(
    "rl",
    version=6,
    title="Reinforcement learning from the cold start",
    estimate=estimates.of_reinforcement,
    check_inputs=_check_tokenizer,
)(reinforce)
traces = stage(
    "traces",
    version=2,
    title="Right answers of the reasoner",
    estimate=estimates.of_traces,
    check_inputs=_check_tokenizer,
)(sample_traces)
student = stage(
    "student",
    version=1,
    title="A model to be distilled into",
    sources=_student_sources,
    check=check_student,
)(take_student)
distill = stage(
    "distill",
    version=3,
    title="Distillation: fine-tuning of an adopted model",
    check_configs=_check_distillation,
)(fine_tune)
evaluate = stage(
    "evaluate",
    version=6,
    title="Evaluation on held-out problems",
    estimate=estimates.of_evaluation,
    check_inputs=_check_evaluated,
)(evaluate_models)
export = stage(
    "export",
    version=2,
    title="Export to Hugging Face",
    estimate=estimates.of_export,
    check_inputs=_check_tokenizer,
)(export_model)
scaling = stage("scaling", version=1, title="Loss against compute", estimate=estimates.of_scaling)(fit_ladder)
report = stage("report", version=3, title="Report", estimate=estimates.of_report)(make_report)
