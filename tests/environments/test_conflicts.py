"""Done when 3, 4 and 5: what the doctor says of broken package sets, and what its repair leaves behind."""

import json
import os
import shutil

import pytest
from packaging.version import Version
from simulate import FIXTURES, difference, doctor, find_site, load_image, make_wheel, pip_check, run, versions

pytestmark = pytest.mark.environments
TORCH_271 = {
    "torch": {"version": "2.7.1", "requires": ["filelock", "networkx", "jinja2", "fsspec", "sympy>=1.13.1"]},
    "torchvision": {"version": "0.22.1", "requires": ["numpy", "torch==2.7.1", "pillow>=5.3.0,!=8.3.*"]},
    "torchaudio": {"version": "2.7.1", "requires": ["torch==2.7.1"]},
    "fsspec": {"version": "2025.3.0", "requires": ["aiohttp!=4.0.0a0,!=4.0.0a1 ; extra == 'http'"]},
}
DATASETS_360 = {
    "version": "3.6.0",
    "requires": [
        "filelock",
        "numpy>=1.17",
        "pyarrow>=15.0.0",
        "dill<0.3.9,>=0.3.0",
        "pandas",
        "requests>=2.32.2",
        "tqdm>=4.66.3",
        "xxhash",
        "multiprocess<0.70.17",
        "fsspec[http]<=2025.3.0,>=2023.1.0",
        "huggingface-hub>=0.24.0",
        "packaging",
        "pyyaml>=5.1",
    ],
}
TRL_0190 = {"version": "0.19.0", "requires": ["accelerate>=1.4.0", "datasets>=3.0.0", "transformers>=4.51.0"]}
FONTJA = {"version": "1.1.0", "requires": ["matplotlib"]}
SACREBLEU = {"version": "2.6.0", "requires": []}


def complaints(report: dict, kind: str = "ours") -> set[tuple[str, str]]:
    return {(c["package"], c["requirement"]) for c in report["conflicts"] if c["kind"] == kind}


def june_image(**overlay) -> dict:
    """The image of the seed's days after `pip install trl==0.19.0 datasets==3.6.0`, with the torch of its
    error message.
    """
    return load_image(
        "image-2025-06-26.json", **TORCH_271, **{"datasets": DATASETS_360, "trl": TRL_0190, **overlay}
    )


def test_the_seeds_two_conflicts_are_explained_and_cured_by_moving_who_complains(make):
    environment = make(june_image(matplotlib_fontja=FONTJA, sacrebleu=SACREBLEU))
    before, baseline = versions(environment), pip_check(environment)

    code, report, said = doctor(environment, "--metadata-only")
    assert code == 1
    assert complaints(report) == {
        ("dpo_helpers", "trl<2,>=0.29.1"),
        ("fastai", "torch<2.7,>=1.10"),
        ("gcsfs", "fsspec==2025.3.2"),
    }
    assert "学習は動きます。fastai だけが困ります" in said and "gcsfs を合う版にします" in said
    assert versions(environment) == before

    code, report, said = doctor(environment, "--metadata-only", "--fix")
    after = versions(environment)
    assert (code, complaints(report)) == (0, set())
    assert pip_check(environment) < baseline
    assert {after[name] for name in ("torch", "torchvision", "torchaudio")} == {"2.7.1", "0.22.1"}
    assert (after["numpy"], after["fsspec"]) == (before["numpy"], "2025.3.0")
    assert after["gcsfs"] == "2025.3.0"
    assert Version(after["fastai"]) > Version(before["fastai"])
    assert Version(after["trl"]) >= Version("0.29.1")
    assert "$ pip install -c constraints.txt" in said


def test_three_conflicts_after_uv_pip_install_trl_are_cured_without_undoing_it(make):
    overlay = json.loads((FIXTURES / "after-uv-pip-install-trl.json").read_text())
    environment = make(
        load_image("image-2026-08-19.json")
        | overlay
        | {
            "matplotlib-fontja": FONTJA,
            "sacrebleu": SACREBLEU,
            "torchao": {"version": "0.18.0", "requires": []},
        }
    )
    before, baseline = versions(environment), pip_check(environment)
    code, report, _ = doctor(environment, "--metadata-only")
    assert code == 1
    assert {package for package, _ in complaints(report)} == {"diffusers", "gradio", "gradio-client"}

    code, report, _ = doctor(environment, "--metadata-only", "--fix")
    assert (code, complaints(report)) == (0, set())
    assert pip_check(environment) < baseline
    moved = {name for name, (old, new) in difference(before, versions(environment)).items() if old and new}
    assert moved >= {"diffusers", "gradio", "gradio-client"}
    assert not moved & {"torch", "numpy", "pandas", "trl", "transformers", "huggingface-hub", "datasets"}


def test_a_replaced_torch_is_refused_with_the_way_to_a_fresh_runtime(make):
    old_torch = {
        "version": "2.6.0+cu118",
        "requires": ["filelock", "fsspec", "jinja2", "networkx", "typing-extensions>=4.10.0"],
    }
    gcsfs = {"version": "2025.3.2", "requires": ["fsspec==2025.3.2"]}
    environment = make(
        load_image(
            "image-2026-08-19.json",
            torch=old_torch,
            gcsfs=gcsfs,
            fsspec={"version": "2025.3.2", "requires": []},
        )
    )
    before = versions(environment)
    code, report, said = doctor(environment, "--metadata-only", "--fix")
    assert code == 1 and report["torch_replaced"]
    assert "ランタイムを接続解除して削除" in said and "何も変更しませんでした" in said
    assert versions(environment) == before


def test_a_package_without_its_files_is_installed_again_in_the_same_version(make):
    image = load_image(
        "image-2026-08-19.json",
        matplotlib_fontja=FONTJA,
        sacrebleu=SACREBLEU,
        trl={"version": "0.29.1", "requires": []},
    )
    image["torchao"]["version"] = "0.18.0"
    version = image.pop("tqdm")["version"]
    environment = make(image)
    site = find_site(environment)
    run(environment, "-m", "pip", "install", "--no-deps", f"tqdm=={version}")
    assert doctor(environment, "--metadata-only")[0] == 0
    shutil.rmtree(site / "tqdm")
    (site / "~qdm-4.0.dist-info").mkdir()  # as a killed pip leaves it
    (site / "half-1.0.dist-info").mkdir()
    before = versions(environment)

    code, report, said = doctor(environment, "--metadata-only")
    assert (code, report["incomplete"]) == (1, ["tqdm"])
    assert "ファイルが欠けています" in said
    assert doctor(environment, "--metadata-only", "--fix")[0] == 0
    assert run(environment, "-c", "import tqdm; print(tqdm.__version__)").stdout.strip() == version
    assert versions(environment) == before


def test_a_hopeless_conflict_does_not_keep_a_curable_one_broken(make):
    image = load_image(
        "image-2026-08-19.json",
        matplotlib_fontja=FONTJA,
        sacrebleu=SACREBLEU,
        trl={"version": "0.29.1", "requires": []},
    )
    image["torchao"]["version"] = "0.18.0"
    image["gcsfs"] = {"version": "2025.3.2", "requires": ["fsspec==2025.3.2"]}
    image["pandas"]["version"] = "2.2.2"  # google-colab asks for 2.2.3, and neither of them may move
    environment = make(image)
    before = versions(environment)

    code, report, said = doctor(environment, "--metadata-only", "--fix")
    assert (code, complaints(report)) == (1, {("google-colab", "pandas==2.2.3")})
    assert "直せませんでした" in said
    assert difference(before, versions(environment)) == {"gcsfs": ("2025.3.2", "2025.3.0")}


def test_a_repair_that_breaks_something_else_is_rolled_back_exactly(make, tmp_path):
    """`stranger` also lacks a package, so that pip's resolver is not led to it and cannot foresee the
    clash.
    """
    image = load_image(
        "image-2026-08-19.json",
        matplotlib_fontja=FONTJA,
        sacrebleu=SACREBLEU,
        trl={"version": "0.29.1", "requires": []},
    )
    image["torchao"]["version"] = "0.18.0"
    image["stranger"] = {"version": "1.0", "requires": ["gcsfs==2025.3.2", "absent"]}
    image["gcsfs"] = {"version": "2025.3.2", "requires": ["fsspec==2025.3.2"]}
    environment = make(image)
    make_wheel(tmp_path, "gcsfs", "2025.3.2", ["fsspec==2025.3.2"], {"gcsfs.py": ""})
    make_wheel(tmp_path, "gcsfs", "2025.3.0", ["fsspec==2025.3.0", "helper-of-gcsfs"], {"gcsfs.py": ""})
    make_wheel(tmp_path, "helper-of-gcsfs", "1.0")
    index = {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(tmp_path)}
    before = versions(environment)

    code, report, said = doctor(environment, "--metadata-only", "--fix", environment=index)
    assert code == 1
    assert ("gcsfs", "fsspec==2025.3.2") in complaints(report)
    assert "元の版に戻します: gcsfs==2025.3.2, helper-of-gcsfs（削除）" in said
    assert versions(environment) == before


def test_a_system_python_is_not_touched(make, get_template):
    """pip's folder alone, on the path of an interpreter that is no virtual environment."""
    environment = make(june_image(google_colab=None))
    code = (
        "import sys; sys.prefix = sys.base_prefix\n"
        "from dpo_helpers.__main__ import main; sys.exit(main(['doctor', '--fix', '--metadata-only']))"
    )
    before = versions(environment)
    process = run(environment, "-c", code)
    assert process.returncode == 1 and "仮想環境" in process.stderr
    assert versions(environment) == before


def test_the_seeds_conflicts_with_the_packages_really_installed(make):
    """Once more, with what complains, what is complained about and datasets as real code that is imported."""
    image = june_image(
        matplotlib_fontja=FONTJA,
        sacrebleu=SACREBLEU,
        trl={"version": "0.29.1", "requires": ["datasets>=3.0.0"]},
        fastai=None,
    )
    needed = [
        "aiohappyeyeballs",
        "aiohttp",
        "aiosignal",
        "attrs",
        "cachetools",
        "certifi",
        "charset-normalizer",
        "datasets",
        "decorator",
        "dill",
        "filelock",
        "frozenlist",
        "fsspec",
        "gcsfs",
        "google-api-core",
        "google-auth",
        "google-auth-oauthlib",
        "google-cloud-core",
        "google-cloud-storage",
        "google-crc32c",
        "google-resumable-media",
        "googleapis-common-protos",
        "hf-xet",
        "huggingface-hub",
        "idna",
        "multidict",
        "multiprocess",
        "numpy",
        "oauthlib",
        "pandas",
        "propcache",
        "proto-plus",
        "protobuf",
        "pyarrow",
        "pyasn1",
        "pyasn1-modules",
        "python-dateutil",
        "pytz",
        "pyyaml",
        "requests",
        "requests-oauthlib",
        "rsa",
        "six",
        "tqdm",
        "typing-extensions",
        "tzdata",
        "urllib3",
        "xxhash",
        "yarl",
    ]
    real = [f"{name}=={image.pop(name)['version']}" for name in needed]
    environment = make(image)
    process = run(environment, "-m", "pip", "install", "--no-deps", "--only-binary", ":all:", *real)
    assert process.returncode == 0, process.stdout + process.stderr
    baseline = pip_check(environment)
    assert complaints(doctor(environment, "--metadata-only")[1]) == {("gcsfs", "fsspec==2025.3.2")}
    code, report, _ = doctor(environment, "--metadata-only", "--fix")
    assert (code, complaints(report)) == (0, set())
    assert pip_check(environment) < baseline
    imported = run(
        environment,
        "-c",
        "import datasets, fsspec, gcsfs; print(datasets.__version__, fsspec.__version__, gcsfs.__version__)",
    )
    assert imported.stdout.split() == ["3.6.0", "2025.3.0", "2025.3.0"], imported.stderr
