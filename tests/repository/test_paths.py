from __future__ import annotations

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refused
from proxy.repository.paths import (
    backup_path,
    date_name,
    is_vm_name,
    timestamp_of,
    vm_directory,
    xva_name,
)

VM = "fda19ed2-4e86-4644-a698-498a6317efb6"


def test_the_date_name_of_a_recorded_backup() -> None:
    assert date_name(1795485541901) == "20261124T015901Z"


@given(st.datetimes(datetime(1970, 1, 2), datetime(9999, 12, 30)))  # noqa: DTZ001
def test_date_names_sort_as_times_and_lead_back(moment: datetime) -> None:
    seconds = int(moment.replace(tzinfo=UTC).timestamp())
    name = date_name(seconds * 1000 + 999)
    assert timestamp_of(name) == seconds * 1000
    assert name < date_name(seconds * 1000 + 1000)


@pytest.mark.parametrize("value", [10**18, -(10**18)])
def test_a_time_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(Refused):
        date_name(value)


@pytest.mark.parametrize("prefix", ["/", ""])
def test_a_clients_id_gets_its_leading_slash(prefix: str) -> None:
    wanted = f"/xo-vm-backups/{VM}/20261124T015901Z.json"
    assert backup_path(prefix + wanted[1:]) == wanted


@pytest.mark.parametrize(
    "filename",
    [
        "",
        "/",
        "/etc/passwd",
        f"//xo-vm-backups/{VM}/20261124T015901Z.json",
        f"/xo-vm-backups/{VM}/../../etc/20261124T015901Z.json",
        "/xo-vm-backups/../20261124T015901Z.json",
        "/xo-vm-backups/./20261124T015901Z.json",
        "/xo-vm-backups/.queue/20261124T015901Z.json",
        f"/xo-vm-backups/{VM}.lock/20261124T015901Z.json",
        "/xo-vm-backups//20261124T015901Z.json",
        "/xo-vm-backups/a\0b/20261124T015901Z.json",
        "/xo-vm-backups/a\nb/20261124T015901Z.json",
        f"/xo-vm-backups/{VM}/20261124T015901Z.json/",
        f"/xo-vm-backups/{VM}/20261124T015901Z.json\n",
        f"/xo-vm-backups/{VM}/.20261124T015901Z.json",
        f"/xo-vm-backups/{VM}/20261124T015901Z.xva",
        f"/xo-vm-backups/{VM}/20261124T015901.json",
        f"/xo-vm-backups/{VM}/\u0662\u0660261124T015901Z.json",
        f"/xo-vm-backups/{VM}/vdis/20261124T015901Z.json",
        f"/xo-config-backups/{VM}/20261124T015901Z.json",
        "x" * 100_000,
    ],
)
def test_any_other_shape_is_refused(filename: str) -> None:
    with pytest.raises(Refused) as caught:
        backup_path(filename)
    assert caught.value.code == "EINVAL"
    assert len(caught.value.message) < 1000


@given(st.text())
def test_an_accepted_id_stays_in_its_vm_directory(vm: str) -> None:
    try:
        path = backup_path(f"/xo-vm-backups/{vm}/20261124T015901Z.json")
    except Refused:
        assert not is_vm_name(vm)
        return
    assert path.split("/")[2] == vm
    assert vm not in {"", ".", ".."}
    assert "/" not in vm


@pytest.mark.parametrize("vm", ["..", ".", "", "a/b", "a.lock", ".hidden", "x" * 300])
def test_a_vm_id_is_one_safe_segment(vm: str) -> None:
    with pytest.raises(Refused):
        vm_directory(vm)


@pytest.mark.parametrize(
    ("field", "name"),
    [
        ("./20261124T015901Z.xva", "20261124T015901Z.xva"),
        ("20261124T015901Z.xva", "20261124T015901Z.xva"),
        ("../other/20261124T015901Z.xva", None),
        ("././a.xva", None),
        ("/etc/passwd", None),
        ("./cache.json.gz", None),
        ("./.xva", None),
        (None, None),
    ],
)
def test_a_metadata_field_names_data_beside_it_or_nothing(
    field: str | None, name: str | None
) -> None:
    assert xva_name(field) == name
