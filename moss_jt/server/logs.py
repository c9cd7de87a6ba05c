"""Log records as lines of JSON, for machines that read them."""

from __future__ import annotations

import datetime
import json
import logging
from typing import Any

ACCESS = "moss_jt.server.access"


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, and the fields that a record was given as `fields`."""

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        when = datetime.datetime.fromtimestamp(record.created, datetime.timezone.utc)
        values: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        fields = getattr(record, "fields", None)
        if isinstance(fields, dict):
            values |= fields
        if record.exc_info:
            values["trace"] = self.formatException(record.exc_info)
        return json.dumps(values, ensure_ascii=True, default=str)
