"""saffe_cache: run each frozen encoder once, then train and judge fusions from the cache.

The layers of the package; an import may only point downwards, and packages of one layer do not import
each other (tests/test_architecture.py holds this):

    cli                                                        the commands
    ablate   bind   caption   match   report                   verbs made of these verbs
    ablation   binding   captioning   matching   reporting     what they are made of
    extract   align   train   evaluate   repair                the verbs: a config in, the path or report out
    extraction   alignment   training   evaluation             what they are made of
    judging                                                    how pairs are searched
    runs                                                       a run's folder
    pairs                                                      which items are trained on and judged
    retrieval                                                  ranks, metrics, protocols, baselines, index
    store   sources   encoders   fusion   objectives   options
    features   durable   fields   flops                        nouns that they exchange; whole files; JSON; FLOPs

Each stage is a function of one frozen dataclass:

    from saffe_cache.extract import ExtractConfig, extract
    from saffe_cache.train import TrainConfig, train
    from saffe_cache.evaluate import EvaluateConfig, evaluate
"""

__version__ = "0.1.0"
