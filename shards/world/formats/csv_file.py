"""One's own data as `csv`: a table `people.csv` beside `images/`, two caption columns."""

import csv
from pathlib import Path
from typing import Any

from shards.world.formats.base import Exporter, Record, people_units
from shards.world.formats.table import table_log, write_table_unit
from shards.world.spec import ExportSpec


def _finish(spec: ExportSpec, root: Path, records: list[Record]) -> dict[str, Any]:
    rows = []
    for record in records:
        row = dict(record["row"])
        for number, caption in enumerate(row.pop("captions"), start=1):
            row[f"caption{number}"] = caption
        rows.append(row)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with (root / "people.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return table_log(spec, records)


EXPORTER = Exporter(people_units, write_table_unit, _finish)
