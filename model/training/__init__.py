"""The paper's two-stage recipe, its data, and the evaluation. The server never imports this.

examples.py     JSON lines of query, positive, negatives and task
sources.py      converters: free texts from Debian packages and data sets -> those lines
stages.py       the data of stage 1 and stage 2, negatives mined
teacher.py      a sentence-transformers model that teaches: vectors, a fixed projection
initialise.py   a new small model: architecture, tokenizer, token embeddings from the teacher
network.py      the trained module: backbone and plain pooler
losses.py       contrastive and distillation losses
settings.py     every choice of a run; stage 1 and stage 2 are two values of it
corpus.py       what a run learns from, and which rows a step sees
adapters.py     LoRA on the backbone's projections, through peft
mistral_import.py  a Mistral as transformers saves it -> a module to train
gradient_cache.py  a loss over many vectors with the graph of only a few
states.py       a run's folder: whose it is, its states, exact resume
objective.py    what a step learns from, and its losses
trainer.py      the loop: batches, steps, validation
plot.py         losses and scores of a run, drawn
average.py      the mean of several checkpoints
pruning.py      `nv-embed prune`: fewer layers, heads and neurons
export.py       the trained module, LoRA merged -> the official checkpoint layout
attention.py    a kernel whose gradients are fast on a CPU
mining.py       positive-aware hard negatives
round_trip.py   whether a query leads back to its positive
endpoint.py     a server that speaks OpenAI's API, and what goes wrong on the way
remote.py       vectors from a running server
chat.py         answers from a chat model
synthesis_prompts.py  what it is asked for: kinds of tasks, tasks, examples
synthesis.py    what its answers hold, and what is still to be asked
answers.py      its answers on disk
convert.py      one's own labelled or scored file -> training lines
validation_sets.py  a retrieval set to choose checkpoints by
metrics.py      nDCG, MRR, recall, Spearman, kNN, logistic regression, V-measure
evaluation.py   `nv-embed evaluate`: sets from files, their instructions, scores
mteb_adapter.py mteb's tasks on a model or a server
bm25.py         the lexical baseline
decontamination.py  training lines that overlap with evaluation texts
commands.py     what `nv-embed train`, `mine`, `synthesize` and `evaluate` do
"""
