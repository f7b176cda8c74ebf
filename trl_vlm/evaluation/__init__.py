"""Metrics as pure functions of replies, and the report that compares models before and after training."""

from trl_vlm.evaluation.chair import ChairScores, chair
from trl_vlm.evaluation.metrics import METRICS, Arm, Metric, split_metrics
from trl_vlm.evaluation.objects.finder import Mention, ObjectFinder
from trl_vlm.evaluation.pope import PopeScores, answers_from_logits, pope
from trl_vlm.evaluation.replies import generate_replies
from trl_vlm.evaluation.report import Report, markdown_report, write_report
from trl_vlm.evaluation.rows import check_scorable_rows, score_rows

__all__ = [
    "METRICS",
    "Arm",
    "ChairScores",
    "Mention",
    "Metric",
    "ObjectFinder",
    "PopeScores",
    "Report",
    "answers_from_logits",
    "chair",
    "check_scorable_rows",
    "generate_replies",
    "markdown_report",
    "pope",
    "score_rows",
    "split_metrics",
    "write_report",
]
