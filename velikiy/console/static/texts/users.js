export const texts = { en: {}, ru: {} };
