"""Metrics as pure functions of replies, and the report that compares models before and after training."""

from trl_vlm.evaluation.benchmark import Benchmark, Question, Ratio, Record, Scores
from trl_vlm.evaluation.benchmarks import BENCHMARKS, find_benchmark
from trl_vlm.evaluation.chair import ChairScores, chair
from trl_vlm.evaluation.metrics import METRICS, Arm, Metric, split_metrics
from trl_vlm.evaluation.objects.finder import Mention, ObjectFinder
from trl_vlm.evaluation.pope import PopeScores, answers_from_logits, pope
from trl_vlm.evaluation.replies import generate_replies
from trl_vlm.evaluation.report import Report, markdown_report, write_report
from trl_vlm.evaluation.results import Result, markdown_results, write_results
from trl_vlm.evaluation.rows import check_scorable_rows, score_rows
from trl_vlm.evaluation.run import JudgeSource, RunSettings, run_benchmarks
from trl_vlm.evaluation.scoring import Judging
from trl_vlm.evaluation.statistics import Difference, Interval, differences, intervals
from trl_vlm.evaluation.subjects import Subject

__all__ = [
    "Arm",
    "BENCHMARKS",
    "Benchmark",
    "ChairScores",
    "Difference",
    "Interval",
    "JudgeSource",
    "Judging",
    "METRICS",
    "Mention",
    "Metric",
    "ObjectFinder",
    "PopeScores",
    "Question",
    "Ratio",
    "Record",
    "Report",
    "Result",
    "RunSettings",
    "Scores",
    "Subject",
    "answers_from_logits",
    "chair",
    "check_scorable_rows",
    "differences",
    "find_benchmark",
    "generate_replies",
    "intervals",
    "markdown_report",
    "markdown_results",
    "pope",
    "run_benchmarks",
    "score_rows",
    "split_metrics",
    "write_report",
    "write_results",
]
