"""Done when 3, 4 and 5: what the doctor says of broken package sets, and what its repair leaves behind."""

import json

import breakages
import pytest
from packaging.version import Version
from simulate import FIXTURES, difference, doctor, load_image, pip_check, run, versions

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


def complaints(report: dict) -> set[tuple[str, str]]:
    return {(c["package"], c["requirement"]) for c in report["conflicts"]}


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
        ("dpo_helpers", "transformers>=4.56.2"),
        ("dpo_helpers", "peft>=0.18"),
        ("dpo_helpers", "trl<2,>=0.29.1"),
        ("dpo_helpers", "torchao>=0.16"),
        ("fastai", "torch<2.7,>=1.10"),
        ("gcsfs", "fsspec==2025.3.2"),
    }
    assert "学習は動きます。fastai だけが困ります" in said and "gcsfs: 2025.3.2 → 2025.3.0" in said
    assert versions(environment) == before
    announced = report["plan"]

    code, report, said = doctor(environment, "--metadata-only", "--fix")
    after = versions(environment)
    assert (code, complaints(report)) == (0, set())
    assert pip_check(environment) < baseline
    assert {after[name] for name in ("torch", "torchvision", "torchaudio")} == {"2.7.1", "0.22.1"}
    assert (after["numpy"], after["fsspec"]) == (before["numpy"], "2025.3.0")
    assert after["gcsfs"] == "2025.3.0"
    assert Version(after["fastai"]) > Version(before["fastai"])
    assert Version(after["trl"]) >= Version("0.29.1")
    assert {name: new for name, (_, new) in difference(before, after).items()} == announced


def test_three_conflicts_after_uv_pip_install_trl_are_cured_by_the_one_package_they_complain_about(make):
    overlay = json.loads((FIXTURES / "after-uv-pip-install-trl.json").read_text())
    ready = {
        "matplotlib-fontja": FONTJA,
        "sacrebleu": SACREBLEU,
        "torchao": {"version": "0.18.0", "requires": []},
    }
    environment = make(load_image("image-2026-08-19.json") | overlay | ready)
    before, baseline = versions(environment), pip_check(environment)
    code, report, _ = doctor(environment, "--metadata-only")
    assert code == 1
    assert {package for package, _ in complaints(report)} == {"diffusers", "gradio", "gradio-client"}

    code, report, _ = doctor(environment, "--metadata-only", "--fix")
    assert (code, complaints(report)) == (0, set())
    assert pip_check(environment) < baseline
    assert set(difference(before, versions(environment))) == {"huggingface-hub"}


def healthy_image(**overlay) -> dict:
    image = load_image("image-2026-08-19.json", matplotlib_fontja=FONTJA, sacrebleu=SACREBLEU)
    image |= {"trl": {"version": "0.29.1", "requires": []}, "torchao": {"version": "0.18.0", "requires": []}}
    return image | {name.replace("_", "-"): package for name, package in overlay.items()}


def test_what_google_colab_pins_is_put_back(make):
    environment = make(healthy_image())
    write = ("pandas", "2.2.2", ["numpy>=1.26.0"])
    breakages.replace_metadata(environment, *write)
    before = versions(environment)
    code, _, said = doctor(environment, "--metadata-only", "--fix")
    assert code == 0, said
    assert difference(before, versions(environment)) == {"pandas": ("2.2.2", "2.2.3")}


def test_a_repair_that_would_break_something_else_is_refused_before_anything_moves(make):
    stranger = {"version": "1.0", "requires": ["gcsfs==2025.3.2", "absent"]}
    gcsfs = {"version": "2025.3.2", "requires": ["fsspec==2025.3.2"]}
    environment = make(healthy_image(stranger=stranger, gcsfs=gcsfs))
    before = versions(environment)
    code, report, said = doctor(environment, "--metadata-only", "--fix")
    assert (code, complaints(report)) == (1, {("gcsfs", "fsspec==2025.3.2")})
    assert "直せないものがあります（元のままにします）" in said and "予告したとおり" not in said
    assert versions(environment) == before


def test_an_extra_that_does_not_fit_keeps_no_repair_from_being_found(make):
    """cuda-toolkit[nvcc], which a user of fsspec asks for, wants another nvcc than the image has."""
    nvcc = {"version": "12.8.1", "requires": ["nvidia-cuda-nvcc-cu12==12.8.93 ; extra == 'nvcc'"]}
    user = {"version": "1.0", "requires": ["cuda-toolkit[nvcc]", "fsspec>=2024"]}
    image = healthy_image(cuda_toolkit=nvcc, user_of_both=user)
    image["nvidia-cuda-nvcc-cu12"] = {"version": "12.9.86", "requires": []}
    environment = make(image)
    breakages.move_fsspec_ahead(environment)
    before = versions(environment)
    code, _, said = doctor(environment, "--metadata-only", "--fix")
    assert code == 0, said
    assert difference(before, versions(environment)) == {"fsspec": ("2025.9.0", "2025.3.0")}


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
        transformers={"version": "4.57.6", "requires": []},
        peft={"version": "0.18.1", "requires": []},
        torchao=None,
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
