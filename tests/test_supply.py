"""The dependencies: direct ones pinned, what they need in turn locked, a licence told of each."""

import re
from importlib import metadata
from pathlib import Path

import pytest
from list_licences import names_in, requirement_files
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import doctor

ROOT = Path(doctor.__file__).resolve().parent
CONSTRAINTS, MINIMUM = ROOT / "constraints.txt", ROOT / "requirements-minimum.txt"
PYTHONS = [(3, minor) for minor in range(10, 14)]
FILES = requirement_files()


def pins(path: Path, python: tuple[int, int]) -> dict[str, list[str]]:
    """{canonical name: versions} that a file pins for a Python on Linux."""
    versions = {"python_version": f"{python[0]}.{python[1]}"}
    versions["python_full_version"] = f"{versions['python_version']}.9"
    machine = {"sys_platform": "linux", "platform_system": "Linux", "platform_machine": "x86_64"}
    found: dict[str, list[str]] = {}
    for line in path.read_text().splitlines():
        line = line.split("#")[0].strip()
        if not line:
            continue
        asked = Requirement(line)
        if asked.marker is None or asked.marker.evaluate(versions | machine):
            (pin,) = asked.specifier
            assert pin.operator == "==", line
            found.setdefault(canonicalize_name(asked.name), []).append(pin.version)
    return found


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("path", FILES, ids=[path.name for path in FILES])
def test_constraints_hold_every_direct_pin(path, python):
    """After a change of a requirement: make constraints."""
    locked = pins(CONSTRAINTS, python)
    for name, versions in pins(path, python).items():
        assert locked[name] == versions, f"{name}; run: make constraints"


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_pin_each_package_once(python):
    assert all(len(versions) == 1 for versions in pins(CONSTRAINTS, python).values())


def test_constraints_fit_every_build_of_torch():
    """No local version such as +cpu, no library of one build, no address of an index."""
    text = CONSTRAINTS.read_text()
    assert not re.search(r"^(nvidia|cuda|triton)|\+cpu|://", text, re.M)
    assert re.search(r"^torch==[\d.]+\s", text, re.M)


@pytest.mark.pinned
def test_constraints_reach_all_that_is_needed_in_turn():
    """Whatever an installed package of the list asks for is in the list too, or left out on
    purpose. What only an extra of a package needs is not looked at."""
    locked = names_in(CONSTRAINTS)
    for name in locked:
        try:
            needs = metadata.requires(name) or []
        except metadata.PackageNotFoundError:
            continue  # an optional one
        for need in map(Requirement, needs):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                other = canonicalize_name(need.name)
                left_out = re.match("nvidia|cuda|triton", other)
                assert other in locked or left_out, f"{name} needs {other}; run: make constraints"


@pytest.mark.pinned
def test_what_is_installed_is_what_is_locked():
    """Of what requirements.txt needs, directly or in turn. Others may share the environment."""
    locked = {}
    for line in CONSTRAINTS.read_text().splitlines():
        asked = Requirement(line.split("#")[0]) if line.split("#")[0].strip() else None
        if asked is not None and (asked.marker is None or asked.marker.evaluate()):
            locked[canonicalize_name(asked.name)] = asked.specifier
    queue, seen = [canonicalize_name(name) for name in doctor.read_pins()], set()
    while queue:
        name = queue.pop()
        if name in seen or name not in locked:
            continue
        seen.add(name)
        found = metadata.version(name)
        assert locked[name].contains(found, prereleases=True), f"{name} {found}; run: make setup"
        for need in map(Requirement, metadata.requires(name) or []):
            if need.marker is None or need.marker.evaluate({"extra": ""}):
                queue.append(canonicalize_name(need.name))
    assert len(seen) > len(doctor.read_pins())


@pytest.mark.parametrize("python", PYTHONS)
def test_minimum_names_the_same_packages_and_is_not_above(python):
    oldest = pins(MINIMUM, python)
    pinned = pins(doctor.REQUIREMENTS, python)
    assert set(oldest) == set(pinned)
    for name, (version,) in oldest.items():
        assert Version(version) <= Version(pinned[name][0]), name


def test_every_direct_dependency_has_its_licence_told():
    """docs/licences.md, with the version that is pinned. After a change: make licences."""
    rows = re.findall(
        r"^\| ([\w.-]+) \| ([\w.]+) \| (\S[^|]*) \|", (ROOT / "docs/licences.md").read_text(), re.M
    )
    told = {canonicalize_name(name): version for name, version, _ in rows if name != "package"}
    for path in FILES:
        for name, versions in pins(path, (3, 11)).items():
            assert told.get(name) == versions[0], f"{name}; run: make licences"
