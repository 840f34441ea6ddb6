"""Whether an answer has the form that its metric asks for, right or wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hybrid.evaluation.metrics import json_pairs, number_in, option_in

#: metric → what an answer of the right form is
FORMATS: Mapping[str, str] = {
    "json_f1": "one JSON object",
    "sql_exact": "SQL that parses",
    "choice": "an option's letter",
    "numeric": "a number",
}


def valid(answer: str, metric: str, labels: Sequence[str] = ()) -> bool | None:
    """Whether an answer has its form: a label of the list, JSON, SQL, a letter, a number. None where none is asked."""
    if labels:
        return answer.strip().casefold() in {label.strip().casefold() for label in labels}
    match metric:
        case "json_f1":
            return json_pairs(answer) is not None
        case "sql_exact":
            return _is_sql(answer)
        case "choice":
            return option_in(answer, "") is not None
        case "numeric":
            return number_in(answer) is not None
        case _:
            return None


def _is_sql(text: str) -> bool:
    """Whether sqlglot reads it as one or more statements; a bare word is an expression to it, and no statement."""
    import sqlglot
    from sqlglot import exp
    from sqlglot.errors import SqlglotError

    statements = (exp.Query, exp.DML, exp.DDL)
    try:
        parsed = sqlglot.parse(text)
    except (SqlglotError, RecursionError):
        return False
    return bool(parsed) and all(isinstance(statement, statements) for statement in parsed)
