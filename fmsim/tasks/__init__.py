"""Questions with known answers over long contexts, to judge a policy by what the model still
answers.

No torch in here.

Families after RULER (Hsieh et al., arXiv 2404.06654), multi-session memory after LongMemEval (Wu et
al., arXiv 2410.10813), and exact multi-round recall after MRCR (Vodrahalli et al., arXiv
2409.12640), in the wording that nano was trained on.
"""

from fmsim.tasks.contexts import FAMILIES, build, context_number, in_contexts
from fmsim.tasks.questions import Question, TaskContext

__all__ = ["FAMILIES", "Question", "TaskContext", "build", "context_number", "in_contexts"]
