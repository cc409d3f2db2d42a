-- How texts are compared. docs/decisions/0069-fold-case-as-unicode-does.md has the reasons and examples.

-- The text as Unicode compares it without regard to case (NFKC_Casefold; The Unicode Standard 3.13, D147). The root
-- collation, because a locale may have rules of its own: in Turkish, "I" is the capital letter of "ı". NFKD comes first,
-- so that each letter is folded alone. lower() leaves some letters that have two small forms, as "σ" and "ς".
CREATE FUNCTION folded(value text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN
    normalize(translate(replace(
        lower(regexp_replace(
            normalize(value, NFKD),
            -- Characters that no font shows (Default_Ignorable_Code_Point).
            U&'[\00AD\034F\061C\115F\1160\17B4\17B5\180B-\180F\200B-\200F\202A-\202E\2060-\206F\3164\FE00-\FE0F\FEFF'
            '\FFA0\FFF0-\FFF8\+01BCA0-\+01BCA3\+01D173-\+01D17A\+0E0000-\+0E0FFF]',
            '', 'g') COLLATE "und-x-icu"),
        'ß', 'ss'), U&'ς\0345ᲀᲁᲂᲃᲄᲅᲆᲇᲈ', 'σιвдосттъѣꙋ'), NFKC);

-- The words of a text, each after a space: `words LIKE '%' || words('Ali') || '%'` matches a text with a word that
-- begins with "Ali". Accents are removed. In scripts without spaces, each character counts as a word, so that a search
-- finds any part of a text. A text without letters and digits has no words; the result is null, which matches nothing.
CREATE OR REPLACE FUNCTION words(value text) RETURNS text LANGUAGE sql IMMUTABLE PARALLEL SAFE RETURN
    nullif(rtrim(regexp_replace(' ' || regexp_replace(
        normalize(replace(replace(replace(translate(
            regexp_replace(
                normalize(folded(value), NFKD),
                -- Marks above, below and in letters, which NFKD separates: accents, points of Hebrew and Arabic, and
                -- the apostrophes of transliterations. Vowel signs and the marks of kana are no accents.
                U&'[\02B9-\02DF\0300-\036F\0483-\0487\0591-\05BD\05BF\05C1\05C2\05C4\05C5\05C7\0610-\061A\0640'
                '\064B-\065F\0670\06D6-\06DC\06DF-\06E4\06E7\06E8\06EA-\06ED\1AB0-\1AFF\1DC0-\1DFF\20D0-\20FF'
                '\FE20-\FE2F]',
                '', 'g'),
            -- Letters with a stroke, a hook or no dot, which Unicode does not decompose: those of alphabets in use,
            -- because each costs time for every letter of a text.
            'đðɗɓǥħıƙłøŧƴƶ', 'dddbghiklotyz'),
            'æ', 'ae'), 'œ', 'oe'), 'þ', 'th'), NFKC),
        -- Thai, Lao, Tibetan, Myanmar, Khmer, Tai, Balinese, Chinese, Japanese, Korean, Yi, Javanese.
        U&'([\0E00-\0EFF\0F40-\0FBC\1000-\109F\1100-\11FF\1780-\17D3\17DC-\17FF\1950-\19DF\1A20-\1A9F\1B00-\1B59'
        '\2E80-\2FD5\3005-\3007\3021-\3029\3038-\303B\3041-\309F\30A1-\30FA\30FC-\30FF\3105-\312F\31A0-\31BF'
        '\31F0-\31FF\3400-\4DBF\4E00-\A48C\A960-\A97F\A980-\A9C0\A9D0-\A9D9\A9E0-\A9FE\AA60-\AADF\AC00-\D7FF'
        '\F900-\FAFF\+01B000-\+01B16F\+020000-\+03FFFF])|[^[:alnum:]]',
        ' \1 ', 'g'), ' +', ' ', 'g')), '');
