"""``tvbases schema``."""

from __future__ import annotations

import json as json_format

from .app import app
from .options import Json, report


@app.command(epilog="Example: tvbases schema --json merge.schema.json")
def schema(json: Json = None) -> None:
    """Print the JSON schema of a merge's YAML, for editors. It has every method and the bounds of its parameters."""
    from tvbases_mergekit.schema import yaml_schema

    found = yaml_schema()
    if json is None:
        print(json_format.dumps(found, indent=2))
    report(json, found)
