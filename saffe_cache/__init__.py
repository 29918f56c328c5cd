"""saffe_cache: run each frozen encoder once, then train and judge fusions from the cache.

The layers of the package; an import may only point downwards, and packages of one layer do not import
each other (tests/test_architecture.py holds this):

    cli                                         the commands
    report                                      one page from results
    studies                                     alignment, binding, captioning, matching, sweeps
    evaluation                                  baselines and controls beside a run's scores; the index
    training                                    one config, the loop, a run's folder
    protocols                                   queries, relevance and scores, for validation and evaluation
    extraction   inputs                         encoders into a cache; what a training reads from one
    retrieval                                   ranks, metrics, baselines, index
    store   sources   encoders   fusion         the cache, the data, the frozen models, the trained modules
    core                                        nouns, options, files, JSON

Each stage is a function of one frozen dataclass:

    from saffe_cache.extraction.extract import ExtractConfig, extract
    from saffe_cache.training.train import TrainConfig, train
    from saffe_cache.evaluation.evaluate import EvaluateConfig, evaluate
"""

__version__ = "0.1.0"
