"Packaging, read from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ini = ConfigParser(delimiters=["="])
ini.read("settings.ini", encoding="utf-8")
cfg = ini["DEFAULT"]
EXTRAS = "training gptq rag evaluation serving selection tracking registry prompting lab dev all".split()


def words(name: str) -> list[str]:
    "The packages that a setting names, each once."
    return list(dict.fromkeys(cfg[name].split()))


setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=Path("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=cfg["author"],
    author_email=cfg["author_email"],
    url=cfg["git_url"],
    project_urls={"Changelog": f"{cfg['git_url']}/blob/{cfg['branch']}/CHANGELOG.md",
                  "Documentation": f"{cfg['doc_host']}{cfg['doc_baseurl']}", "Issues": f"{cfg['git_url']}/issues"},
    license="Apache-2.0",
    keywords=cfg["keywords"],
    classifiers=["Development Status :: 3 - Alpha", "Operating System :: POSIX :: Linux", "Typing :: Typed",
                 *(f"Programming Language :: Python :: 3.{minor}" for minor in (11, 12, 13))],
    packages=find_packages(include=["llmops", "llmops.*"]),
    package_data={"llmops": ["py.typed"]},
    install_requires=words("requirements"),
    extras_require={extra: words(f"{extra}_requirements") for extra in EXTRAS},
    entry_points={
        "console_scripts": cfg["console_scripts"].split(),
        "nbdev": [f"{cfg['lib_name']}={cfg['lib_name']}._modidx:d"],
        "jupyter_client.kernel_provisioners": ["llmops-warm=llmops.tools.warm:WarmProvisioner"],
        "papermill.engine": ["llmops=llmops.tools.batch:LibraryEngine"],
        "papermill.io": ["params=llmops.tools.batch:ParamFiles"],
    },
    zip_safe=False,
)
