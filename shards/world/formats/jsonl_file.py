"""One's own data as `jsonl`: `people.jsonl` beside `images/`."""

import json
from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, people_units, put
from shards.world.formats.table import table_log, write_table_unit
from shards.world.spec import ExportSpec


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    lines = "".join(json.dumps(record["row"]) + "\n" for record in records)
    put(root, "people.jsonl", lines.encode())
    return table_log(spec, records)


EXPORTER = Exporter(people_units, write_table_unit, _finish)
