"""``webdataset: URL`` of a configuration: finished shards are also written as tars that the published 4M code trains from.

Every build ends with it. Shards that were written before are left alone, unless their rows or values are others now.
"""

from __future__ import annotations

from fourmill.config import Config
from fourmill.errors import ConfigError, WorkMissing
from fourmill.flows.exporting import decoders
from fourmill.flows.progress import say
from fourmill.flows.resolve import Resolved
from fourmill.flows.training import make_snapshot
from fourmill.lease import Lease
from fourmill.shards.export import ExportReport, export_webdataset
from fourmill.shards.export_cells import is_exportable, needs_labels
from fourmill.storage import Store


def check_webdataset(resolved: Resolved) -> None:
    """Refuse, before any work, what could not be written at its end."""
    if resolved.config.webdataset is None:
        return
    shown = [wanted for wanted in resolved.wanted.values() if is_exportable(wanted.modality)]
    if not shown:
        raise ConfigError("webdataset: none of the modalities has a place in tars; remove the key")
    for wanted in shown:
        if needs_labels(wanted.modality, resolved.config.n_crops) and not wanted.keep_labels:
            raise ConfigError(
                f"webdataset: {wanted.name} is written there from labels of whole images; set "
                f"modalities.{wanted.name}.keep_labels: true, or remove `webdataset`"
            )


def grow_webdataset(config: Config) -> ExportReport | None:
    """Add what is finished in all modalities; None where nothing is, or where another process is adding.

    As every export does, it registers a snapshot of what it reads.
    """
    assert config.webdataset is not None
    lease = Lease(Store(config.webdataset))
    try:
        lease.acquire()
    except ConfigError as error:
        say(f"webdataset: {error}; the next build adds what is missing")
        return None
    lease.start()
    try:
        snapshot = make_snapshot(config)
        report = export_webdataset(snapshot, config.webdataset, decode=decoders(snapshot), grow=True)
    except WorkMissing:  # no shard is finished: the build says so
        return None
    finally:
        lease.release()
    lease.check()
    say(f"webdataset: {report.written} shards written, {report.shards} in all: {config.webdataset}")
    return report
