"""Builds the package from settings.ini, where nbdev keeps the project's facts."""
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

config = ConfigParser(delimiters=['='])
config.read('settings.ini', encoding='utf-8')
facts = config['DEFAULT']
extras = {name: facts[f'{name}_requirements'].split() for name in ('dev', 'docs', 'bench', 'cluster')}
statuses = {'3': '3 - Alpha', '4': '4 - Beta', '5': '5 - Production/Stable'}
major, oldest_minor = facts['min_python'].split('.')

setup(
    name=facts['lib_name'],
    version=facts['version'],
    description=facts['description'],
    long_description=Path('README.md').read_text(encoding='utf-8'),
    long_description_content_type='text/markdown',
    license_expression='Apache-2.0',
    author=facts['author'],
    author_email=facts['author_email'],
    keywords=facts['keywords'],
    url=facts['git_url'],
    classifiers=[
        f"Development Status :: {statuses[facts['status']]}",
        f"Intended Audience :: {facts['audience']}",
        f"Natural Language :: {facts['language']}",
        *(f'Programming Language :: Python :: {major}.{minor}' for minor in range(int(oldest_minor), 15)),
    ],
    python_requires=f">={facts['min_python']}",
    packages=find_packages(include=['wib_nbdev', 'wib_nbdev.*']),
    package_data={'wib_nbdev': ['py.typed', '*.ini', 'sample/*', 'templates/*', 'results/README.md',
                                'results/runs.csv', 'results/verdicts.csv', 'results/robustness.csv',
                                'results/epochs.parquet', 'results/correct.parquet',
                                'results/depth.parquet', 'results/depth_trial.parquet',
                                'results/depth_signals.parquet', 'results/pace.csv']},
    include_package_data=False,
    install_requires=facts['requirements'].split(),
    extras_require=extras,
    entry_points={'console_scripts': facts.get('console_scripts', '').split()},
    zip_safe=False,
)
