"Packaging, read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=["Development Status :: 3 - Alpha", "Programming Language :: Python :: 3.11"],
    packages=find_packages(include=["llmops", "llmops.*"]),
    python_requires=f">={cfg['min_python']}",
    install_requires=cfg["requirements"].split(),
    extras_require={"dev": cfg["dev_requirements"].split()},
    entry_points={
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
        "jupyter_client.kernel_provisioners": ["llmops-warm=llmops.tools.warm:WarmProvisioner"],
        "papermill.engine": ["llmops=llmops.tools.batch:LibraryEngine"],
        "papermill.io": ["params=llmops.tools.batch:ParamFiles"],
    },
    zip_safe=False,
)
