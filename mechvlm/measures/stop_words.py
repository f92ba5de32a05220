"""English words of grammar alone, which say nothing of an image.

Ready-made lists also contain words for things seen in images: scikit-learn's "two", "fire" and
"front", stop-words' "man", "room" and "large".
"""

STOP_WORDS = frozenset(
    {
        # articles, determiners, quantifiers
        "a", "an", "the", "this", "that", "these", "those", "some", "any", "no", "every", "each", "either",
        "neither", "both", "all", "such", "another", "other", "others", "same", "own", "much", "many", "more",
        "most", "few", "less", "least", "several", "enough",
        # pronouns
        "i", "me", "my", "mine", "myself", "we", "us", "our", "ours", "ourselves", "you", "your", "yours",
        "yourself", "yourselves", "he", "him", "his", "himself", "she", "her", "hers", "herself", "it", "its",
        "itself", "they", "them", "their", "theirs", "themselves", "who", "whom", "whose", "which", "what",
        "someone", "something", "anyone", "anything", "everyone", "everything", "nobody", "nothing", "none",
        # prepositions
        "of", "to", "in", "on", "at", "by", "for", "with", "from", "into", "onto", "upon", "about", "above",
        "across", "after", "against", "along", "among", "around", "as", "before", "behind", "below", "beneath",
        "beside", "besides", "between", "beyond", "down", "during", "except", "inside", "like", "near", "off",
        "out", "outside", "over", "past", "per", "since", "than", "through", "throughout", "toward", "towards",
        "under", "until", "up", "via", "while", "within", "without",
        # conjunctions
        "and", "or", "but", "nor", "so", "yet", "if", "because", "although", "though", "unless", "whether",
        # auxiliaries, and verbs with little meaning of their own
        "am", "is", "are", "was", "were", "be", "been", "being", "have", "has", "had", "having", "do", "does",
        "did", "doing", "done", "can", "could", "may", "might", "must", "shall", "should", "will", "would",
        "cannot", "go", "get",
        # adverbs
        "not", "there", "here", "then", "when", "where", "why", "how", "again", "also", "almost", "already",
        "always", "just", "even", "ever", "never", "now", "often", "only", "quite", "rather", "still", "together",
        "too", "very", "well", "away",
        # parts of contractions, split at the apostrophe
        "aren", "couldn", "didn", "doesn", "don", "hadn", "hasn", "haven", "isn", "ll", "shouldn", "ve", "wasn",
        "weren", "wouldn",
    }
)  # fmt: skip
